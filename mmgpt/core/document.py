"""Documents: an ordered list of segments, the form every source is imported to and every grammar encodes.

A *raw* document holds text and encoded media bytes. A *tokenised* document is the same document with its
text as ids and its media as code grids; no layout is in it, so a grammar can lay it out at load.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """One piece of a document.

    `role` names the speaker or purpose ("user", "assistant", ""), `time` is seconds from the start of the
    document's clip, `loss` multiplies the grammar's weight for every token of the segment.
    """

    role: str = ""
    time: float | None = None
    loss: float = 1.0


MARKS = ("answer", "/answer", "global_cot", "/global_cot", "image_cot", "/image_cot", "time")
"""Roles of a text that mark the point where it begins: a part of the document that opens or ends ("/") there, or a
time. A grammar that knows a mark lays a control before the text, which may be empty. Append only: numbers on disk."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text(Segment):
    """Text: `text` when raw, `ids [N] int32` when tokenised. Its role may be one of MARKS."""

    text: str | None = None
    ids: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Image(Segment):
    """A picture: `data` encoded bytes (JPEG, PNG, WebP, GIF) when raw, `codes [H, W, C] int32` when tokenised.

    `C` is the number of codebooks: the codes that describe one place of the grid.
    """

    data: bytes | None = None
    codes: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Video(Segment):
    """A clip: `data` encoded bytes (MP4) when raw, `codes [T, H, W, C] int32` when tokenised; `fps` of the frames."""

    data: bytes | None = None
    codes: np.ndarray | None = None
    fps: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Action(Segment):
    """Robot actions: `values [T, A] float32` when raw, `codes [N] int32` when tokenised."""

    values: np.ndarray | None = None
    codes: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features(Segment):
    """Regions or frames as features: `feats [N, F] float32`, `boxes [N, 4]` in 0..1, `labels [N] int32`."""

    feats: np.ndarray | None = None
    boxes: np.ndarray | None = None
    labels: np.ndarray | None = None


KINDS: tuple[type[Segment], ...] = (Text, Image, Video, Action, Features)
"""Segment classes in the order of their number on disk (append only)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """A key that is unique in its source, segments in reading order, and provenance as strings."""

    key: str
    segments: tuple[Segment, ...]
    meta: dict[str, str] = dataclasses.field(default_factory=dict)


def equal(a: Document, b: Document) -> bool:
    """Whether two documents hold the same segments, arrays compared by value."""
    if a.key != b.key or a.meta != b.meta or len(a.segments) != len(b.segments):
        return False
    return all(_segments_equal(x, y) for x, y in zip(a.segments, b.segments, strict=True))


def _segments_equal(a: Segment, b: Segment) -> bool:
    if type(a) is not type(b):
        return False
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, np.ndarray) or isinstance(y, np.ndarray):
            if x is None or y is None or not np.array_equal(x, y):
                return False
        elif x != y:
            return False
    return True
