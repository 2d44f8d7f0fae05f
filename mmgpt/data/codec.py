"""The bytes of one record: a document without any code in it.

A little-endian uint32 header length, a UTF-8 JSON header (key, meta, segments), then the blobs that the header lists
with field, type and shape. `decode` checks every bound before it reads.
"""

import json
import math
import struct
from typing import Any

import numpy as np

from mmgpt.core.document import KINDS, Action, Document, Features, Image, Segment, Text, Video
from mmgpt.core.errors import UserError

_KIND_OF_NAME: dict[str, type[Segment]] = {kind.__name__.lower(): kind for kind in KINDS}
_BYTES_FIELDS: dict[type[Segment], str] = {Image: "data", Video: "data"}
_ARRAY_FIELDS: dict[type[Segment], dict[str, tuple[str, int]]] = {
    Text: {"ids": ("int32", 1)},
    Image: {"codes": ("int32", 3)},
    Video: {"codes": ("int32", 4)},
    Action: {"values": ("float32", 2), "codes": ("int32", 1)},
    Features: {"feats": ("float32", 2), "boxes": ("float32", 2), "labels": ("int32", 1)},
}
_NUMBER = (int, float)


class RecordError(UserError, ValueError):
    """A record that cannot be written or read: what is wrong, and where."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{where}: {what}")
        self.what = what
        self.where = where


def encode(document: Document) -> bytes:
    """The record of a document. Raises RecordError for wrong types, ranks, or text that is not Unicode."""
    if not isinstance(document.key, str) or not document.key:
        raise RecordError(f"the key must be a non-empty string, found {document.key!r}", "document")
    where = f"document {document.key!r}"
    if not all(isinstance(k, str) and isinstance(v, str) for k, v in document.meta.items()):
        raise RecordError(f"meta must map strings to strings, found {document.meta!r}", where)
    blobs: list[bytes] = []
    segments = [_segment_header(s, blobs, f"{where}, segment {i}") for i, s in enumerate(document.segments)]
    body = {"key": document.key, "meta": document.meta, "segments": segments}
    try:
        header = json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (ValueError, TypeError) as e:  # a lone surrogate, NaN, or a value that is no JSON
        raise RecordError(f"cannot be written as JSON ({e})", where) from e
    return b"".join([struct.pack("<I", len(header)), header, *blobs])


def _segment_header(segment: Segment, blobs: list[bytes], where: str) -> dict[str, Any]:
    kind = type(segment)
    if kind not in _ARRAY_FIELDS:
        raise RecordError(f"a segment is one of {', '.join(_KIND_OF_NAME)}, found {kind.__name__}", where)
    header: dict[str, Any] = {"kind": kind.__name__.lower()}
    if segment.role:
        header["role"] = segment.role
    if segment.time is not None:
        header["time"] = segment.time
    if segment.loss != 1.0:
        header["loss"] = segment.loss
    if isinstance(segment, Text) and segment.text is not None:
        header["text"] = segment.text
    if isinstance(segment, Video) and segment.fps is not None:
        header["fps"] = segment.fps
    listed: list[list[Any]] = []
    if isinstance(segment, (Image, Video)) and segment.data is not None:
        listed.append(["data", "bytes", [len(segment.data)]])
        blobs.append(bytes(segment.data))
    for name, (dtype, rank) in _ARRAY_FIELDS[kind].items():
        array = vars(segment)[name]
        if array is None:
            continue
        if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != rank:
            found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
            raise RecordError(f"{name} must be an {dtype} array of rank {rank}, found {found}", where)
        if name == "codes" and rank > 1 and not array.shape[-1]:
            raise RecordError(f"codes {list(array.shape)} have no code for a place", where)
        listed.append([name, dtype, list(array.shape)])
        blobs.append(np.ascontiguousarray(array, np.dtype(dtype).newbyteorder("<")).tobytes())
    if listed:
        header["blobs"] = listed
    return header


def decode(data: bytes, where: str = "record") -> Document:
    """The document of a record; `where` names the record in errors. Raises RecordError for any damage."""
    if len(data) < 4:
        raise RecordError(f"{len(data)} bytes are too short for a header length", where)
    start = 4 + struct.unpack_from("<I", data)[0]
    if start > len(data):
        raise RecordError(f"the header ends at byte {start}, the record at {len(data)}", where)
    try:
        header = json.loads(data[4:start].decode())
    except (ValueError, RecursionError) as e:
        raise RecordError(f"the header is not JSON ({e})", where) from e
    header = _typed(header, dict, "the header", where)
    key = _typed(header.get("key"), str, "the key", where)
    meta = _typed(header.get("meta"), dict, "meta", where)
    if not all(isinstance(v, str) for v in meta.values()):
        raise RecordError("meta holds a value that is not a string", where)
    segments: list[Segment] = []
    for i, item in enumerate(_typed(header.get("segments"), list, "segments", where)):
        segment, start = _decode_segment(item, data, start, f"{where} ({key!r}), segment {i}")
        segments.append(segment)
    if start != len(data):
        raise RecordError(f"the blobs end at byte {start}, the record at {len(data)}", where)
    return Document(key=key, segments=tuple(segments), meta=meta)


def _typed(value: Any, kind: type | tuple[type, ...], what: str, where: str) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise RecordError(f"{what} has the wrong type: {str(value)[:60]!r}", where)
    return value


def _decode_segment(item: Any, data: bytes, start: int, where: str) -> tuple[Segment, int]:
    item = _typed(item, dict, "the segment", where)
    kind = _KIND_OF_NAME.get(str(item.get("kind")))
    if kind is None:
        raise RecordError(f"unknown segment kind {item.get('kind')!r}", where)
    fields: dict[str, Any] = {}
    types: dict[str, Any] = {"role": str, "time": _NUMBER, "loss": _NUMBER}
    types |= {"text": str} if kind is Text else {"fps": _NUMBER} if kind is Video else {}
    for name, value in item.items():
        if name in types:
            value = _typed(value, types[name], name, where)
            if types[name] is _NUMBER and not abs(value) < 1e300:
                raise RecordError(f"{name} is {str(value)[:60]}", where)
            fields[name] = float(value) if types[name] is _NUMBER else value
        elif name not in ("kind", "blobs"):
            raise RecordError(f"unknown field {name!r}", where)
    for blob in _typed(item.get("blobs", []), list, "blobs", where):
        name, value, start = _decode_blob(kind, blob, data, start, where)
        fields[name] = value
    return kind(**fields), start


def _decode_blob(kind: type[Segment], blob: Any, data: bytes, start: int, where: str) -> tuple[str, Any, int]:
    if not (isinstance(blob, list) and len(blob) == 3 and isinstance(blob[0], str) and isinstance(blob[2], list)):
        raise RecordError(f"a blob is [field, dtype, shape], found {str(blob)[:60]!r}", where)
    name, dtype, shape = blob
    expected = ("bytes", 1) if _BYTES_FIELDS.get(kind) == name else _ARRAY_FIELDS[kind].get(name)
    if expected is None or (dtype, len(shape)) != expected:
        raise RecordError(f"blob {name!r} {dtype} of rank {len(shape)} is not part of a {kind.__name__.lower()}", where)
    if not all(type(n) is int and 0 <= n < 2**31 for n in shape):
        raise RecordError(f"blob {name!r} has the shape {str(shape)[:60]}", where)
    end = start + math.prod(shape) * (1 if dtype == "bytes" else 4)
    if end > len(data):
        raise RecordError(f"blob {name!r} ends at byte {end}, the record at {len(data)}", where)
    if dtype == "bytes":
        return name, data[start:end], end
    array = np.frombuffer(data, np.dtype(dtype).newbyteorder("<"), math.prod(shape), start).astype(dtype)
    return name, array.reshape(shape), end
