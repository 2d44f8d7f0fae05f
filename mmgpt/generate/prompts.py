"""Prompts from texts, pictures and clips: pieces in the order in which the model reads them, as a document."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from mmgpt.core.document import Document, Image, Segment, Video
from mmgpt.data.media import MediaError, decode_image, decode_video, resize
from mmgpt.generate.decode import PromptError
from mmgpt.generate.outline import Outline

if TYPE_CHECKING:
    from mmgpt.generate.model import Model

Decoded = TypeVar("Decoded")
ROLES = ("", "user", "assistant")
KINDS = ("text", "image", "video")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """A `text`, or a medium's `frames [T, H, W, 3] uint8`: an image's one or a `clip`'s; `role` as in a document."""

    text: str = ""
    frames: np.ndarray | None = None
    clip: bool = False
    role: str = ""


Pieces = str | np.ndarray | Piece
"""A text, a picture `[H, W, 3]` or a clip `[T, H, W, 3]` uint8."""


def piece(given: Pieces) -> Piece:
    """What was given, as a piece; PromptError for an array that is no picture."""
    if isinstance(given, Piece):
        return given
    if isinstance(given, str):
        return Piece(text=given)
    array = np.asarray(given)
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or array.shape[-1] != 3 or not array.size:
        raise PromptError(
            f"expected a picture uint8 [H, W, 3] or a clip [T, H, W, 3], found {array.dtype} {list(array.shape)}."
        )
    return Piece(frames=array if array.ndim == 4 else array[None], clip=array.ndim == 4)


def outlined(outline: Outline, pieces: Sequence[Piece]) -> Document:
    """A document that is as long as the prompt, or shorter, without tokenising a picture."""
    segments: list[Segment] = []
    for part in pieces:
        if part.frames is None:
            segments.append(outline.words(part.text, part.role))
        else:
            segments.append(outline.blank(part.frames.shape, part.role, clip=part.clip))
    return Document(key="prompt", segments=tuple(segments))


def document_of(
    model: "Model",
    *pieces: Pieces,
    clip: np.ndarray | None = None,
    pictures: Sequence[np.ndarray] = (),
    text: str = "",
) -> Document:
    """A prompt of pieces in their order; or of a clip, pictures and a text, in this order, each if given.

    Pictures are brought to the largest size that the model knows. PromptError where it knows none.
    """
    given: list[Pieces] = [*([] if clip is None else [clip]), *pictures, *([text] if text else [])]
    segments: list[Segment] = []
    for part in map(piece, (*pieces, *given)):
        if part.frames is None:
            segments.append(model.outline.words(part.text, part.role))
            continue
        height, width = model.outline.pixels(part.frames.shape[1], part.frames.shape[2])
        frames = np.stack([resize(frame, height, width) for frame in part.frames])
        if part.clip:
            segments.append(Video(codes=model.vision.encode_clip(frames), role=part.role))
        else:
            segments.append(Image(codes=model.vision.encode(frames)[0], role=part.role))
    return Document(key="prompt", segments=tuple(segments))


def read_image(path: Path, role: str = "") -> Piece:
    """A picture file; PromptError where there is none."""
    return Piece(frames=_decoded(path, decode_image)[None], role=role)


def read_video(path: Path, role: str = "") -> Piece:
    """A video file; PromptError where there is none."""
    return Piece(frames=_decoded(path, decode_video)[0], clip=True, role=role)


def read_text(text: str, role: str = "", where: str = "--prompt") -> Piece:
    """A text; PromptError where the terminal gave bytes that are none."""
    if text.encode(errors="replace") != text.encode(errors="surrogatepass"):
        raise PromptError(f"{where} is not UTF-8; write it in a UTF-8 terminal.")
    return Piece(text=text, role=role)


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise PromptError(f"{path}: {'is a folder; name one file' if path.is_dir() else 'no such file'}.")


def _decoded(path: Path, decode: Callable[[bytes], Decoded]) -> Decoded:
    _check_file(path)
    try:
        return decode(path.read_bytes())
    except MediaError as e:
        raise PromptError(f"{path}: {e}") from e


def read_pieces(path: Path) -> list[Piece]:
    """A JSON list of pieces: `{"text": ...}`, `{"image": FILE}` or `{"video": FILE}`, with a `"role"` or without.

    One piece may hold several: media come before the text. Files are named from the folder of the list.
    """
    _check_file(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:  # of JSON, of its encoding, of its depth, of a number's length
        raise PromptError(f"{path}: not JSON ({e}). Give a list of {{'text': ...}}, {{'image': FILE}} pieces.") from e
    if not isinstance(found, list) or not found:
        raise PromptError(f"{path}: expected a list of pieces, found {str(found)[:60]!r}.")
    return [piece for number, value in enumerate(found) for piece in _pieces(path, number, value)]


def _pieces(path: Path, number: int, value: Any) -> list[Piece]:
    where = f"{path}, piece {number}"
    known = (*KINDS, "role")
    if not isinstance(value, dict) or not set(value) <= set(known) or not set(value) & set(KINDS):
        raise PromptError(f"{where}: expected a table with {', '.join(KINDS)} and role, found {str(value)[:60]!r}.")
    if not all(isinstance(v, str) for v in value.values()) or value.setdefault("role", "") not in ROLES:
        raise PromptError(f"{where}: values are strings and a role is user or assistant, found {str(value)[:60]!r}.")
    role, found = value["role"], []
    if "image" in value:
        found.append(read_image(path.parent / value["image"], role))
    if "video" in value:
        found.append(read_video(path.parent / value["video"], role))
    if "text" in value:
        found.append(read_text(value["text"], role, where))
    return found
