"""The sidecar index of a dataset: the size of every segment, so that lengths are known without reading records."""

import dataclasses
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import numpy as np

from mmgpt.core.document import KINDS, MARKS, Action, Document, Features, Image, Segment, Text, Video

_FIELDS: dict[str, tuple[str, tuple[int, ...]]] = {
    "offset": ("int64", ()),
    "kind": ("uint8", ()),
    "shape": ("int32", (5,)),
    "loss": ("float32", ()),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Index:
    """Sizes of all segments, in document order: segments of document d are `offset[d] : offset[d + 1]`.

    `offset [N+1] int64`, `kind [S] uint8` (position in KINDS), `loss [S] float32`, `shape [S, 5] int32`: text ids
    (n,M,0,0,0) where M is 1 + the role's number in MARKS or 0, raw text (characters,0,0,0,0), image codes (1,H,W,C,P),
    video codes (T,H,W,C,P) where P counts the places whose first code is not 0, action codes (n,0,0,0,0), features
    (N,F,0,0,0), raw media zeros.
    """

    offset: np.ndarray
    kind: np.ndarray
    shape: np.ndarray
    loss: np.ndarray

    @classmethod
    def of(cls, documents: Iterable[Document]) -> Self:
        """The index of some documents."""
        counts, segments = [0], []
        for document in documents:
            counts.append(len(document.segments))
            segments += [(KINDS.index(type(s)), segment_shape(s), s.loss) for s in document.segments]
        return cls(
            offset=np.cumsum(counts, dtype=np.int64),
            kind=np.array([s[0] for s in segments], np.uint8),
            shape=np.array([s[1] for s in segments], np.int32).reshape(-1, 5),
            loss=np.array([s[2] for s in segments], np.float32),
        )

    @classmethod
    def joined(cls, parts: list[Self]) -> Self:
        """The index of shards laid end to end."""
        starts = np.cumsum([0, *(len(p.kind) for p in parts)])
        offsets = [p.offset[1:] + start for p, start in zip(parts, starts[:-1], strict=True)]
        return cls(
            offset=np.concatenate([np.zeros(1, np.int64), *offsets]),
            kind=np.concatenate([np.zeros(0, np.uint8), *(p.kind for p in parts)]),
            shape=np.concatenate([np.zeros((0, 5), np.int32), *(p.shape for p in parts)]),
            loss=np.concatenate([np.zeros(0, np.float32), *(p.loss for p in parts)]),
        )

    def save(self, directory: Path) -> None:
        """Writes the arrays as `index-<field>.npy`, each whole or not at all. Raises OSError."""
        for field in _FIELDS:
            # A name of its own: of several processes that share a folder, two may end at once.
            temporary = directory / f".index-{field}.npy.{secrets.token_hex(6)}.tmp"
            try:
                with open(temporary, "wb") as file:
                    np.save(file, vars(self)[field], allow_pickle=False)
                    file.flush()
                    os.fsync(file.fileno())  # the manifest must not outlive the index when the machine stops
                temporary.replace(directory / f"index-{field}.npy")
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise

    @classmethod
    def load(cls, directory: Path, documents: int, segments: int) -> Self:
        """Maps the arrays into memory. Raises OSError, and ValueError for other sizes than said."""
        arrays: dict[str, np.ndarray] = {}
        for field, (dtype, tail) in _FIELDS.items():
            path = directory / f"index-{field}.npy"
            shape = (documents + 1 if field == "offset" else segments, *tail)
            try:
                array = np.load(path, mmap_mode="r", allow_pickle=False)
            except (EOFError, ValueError) as e:
                raise ValueError(f"{path}: {e}") from e
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(f"{path}: expected {dtype} {shape}, found {array.dtype} {array.shape}")
            arrays[field] = array
        return cls(**arrays)


def segment_shape(segment: Segment) -> tuple[int, int, int, int, int]:
    """The row of a segment in `Index.shape`."""
    match segment:
        case Text(ids=np.ndarray() as ids, role=role):
            return (len(ids), 1 + MARKS.index(role) if role in MARKS else 0, 0, 0, 0)
        case Text(text=str() as text):
            return (len(text), 0, 0, 0, 0)
        case Image(codes=np.ndarray() as codes):
            H, W, C = codes.shape
            return (1, H, W, C, int(np.count_nonzero(codes[..., 0])))
        case Video(codes=np.ndarray() as codes):
            T, H, W, C = codes.shape
            return (T, H, W, C, int(np.count_nonzero(codes[..., 0])))
        case Action(codes=np.ndarray() as codes):
            return (len(codes), 0, 0, 0, 0)
        case Features(feats=np.ndarray() as feats):
            N, F = feats.shape
            return (N, F, 0, 0, 0)
    return (0, 0, 0, 0, 0)
