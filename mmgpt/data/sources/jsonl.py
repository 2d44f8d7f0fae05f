"""Interleaved documents, one JSON object a line, in a .jsonl file or in all .jsonl files of a folder.

    {"key": "story-17", "meta": {"author": "..."}, "segments": [{"text": "Look:"}, {"image": "images/a.png"},
     {"video": "clips/a.mp4"}, {"text": "What is it?", "role": "user", "loss": 0.0}]}

Media paths are relative to the folder of the file; absolute paths, ".." and URLs are not accepted. A segment may
carry `role`, `time` (seconds) and `loss` (multiplies the weight of its tokens). The text of a mark, such as
`{"text": "", "role": "answer"}`, may be empty.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmgpt.core.document import MARKS, Image, Segment, Text, Video
from mmgpt.data.captions import Reject
from mmgpt.data.files import MAX_TEXT_BYTES, FileError, as_text, read_inside
from mmgpt.data.sources import Found, SourceError

_KINDS = ("text", "image", "video")
_MAX_LOSS = 1000
_MAX_KEY = 512


def documents(path: Path, reject: Reject) -> Iterator[Found]:
    """Documents in the order of the lines. Raises SourceError if there is no such file."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files or not path.exists():
        raise SourceError(f"{path}: holds no .jsonl file; the format 'jsonl' reads a file or a folder of them.")
    for file in files:
        if not file.is_file():
            reject(file.name, "not a regular file", str(file))
            continue
        with open(file, "rb") as lines:
            number = 0
            while line := lines.readline(MAX_TEXT_BYTES):
                number += 1
                place = f"{file}:{number}"
                if not line.endswith(b"\n") and len(line) == MAX_TEXT_BYTES:
                    reject(f"line {number}", f"line over {MAX_TEXT_BYTES} bytes", place)
                    _skip_line(lines.readline)
                elif line.strip():
                    document = _document(line, file.parent, place, reject)
                    if document is not None:
                        yield document


def _skip_line(readline: Any) -> None:
    while (rest := readline(MAX_TEXT_BYTES)) and not rest.endswith(b"\n"):
        pass


def _document(line: bytes, root: Path, place: str, reject: Reject) -> Found | None:
    key = f"line {place.rpartition(':')[2]}"
    try:
        try:
            item = json.loads(as_text(line), parse_constant=_no_constant)
        except FileError:
            raise
        except (ValueError, RecursionError, OverflowError) as e:  # ValueError: also an integer of thousands of digits
            raise FileError("malformed JSON", str(e)) from e
        _expect(isinstance(item, dict), "the line is no JSON object")
        found = item.get("key")
        _expect(isinstance(found, str) and 0 < len(found) <= _MAX_KEY, f"key must be a string of 1 to {_MAX_KEY}")
        key = found
        unknown = sorted(item.keys() - {"key", "segments", "meta"})
        _expect(not unknown, f"unknown field {unknown[:1]}; there are key, segments, meta")
        meta = item.get("meta", {})
        _expect(isinstance(meta, dict), "meta must be a table")
        _expect(all(isinstance(v, str) for v in meta.values()), "every value of meta must be a string")
        parts = item.get("segments")
        _expect(isinstance(parts, list) and len(parts) > 0, "segments must be a list with at least one segment")
        segments = tuple(_segment(part, root, f"segment {i}") for i, part in enumerate(parts))
        return Found(key=key, segments=segments, meta=meta, place=place)
    except FileError as e:
        reject(key, str(e), place)
        return None


def _no_constant(name: str) -> None:
    raise FileError("malformed JSON", f"{name} is no JSON number")


def _expect(sound: bool, expected: str) -> None:
    if not sound:
        raise FileError("wrong type", expected)


def _segment(part: Any, root: Path, what: str) -> Segment:
    _expect(isinstance(part, dict), f"{what} must be a table")
    kinds = [k for k in _KINDS if k in part]
    _expect(len(kinds) == 1, f"{what} must have exactly one of {', '.join(_KINDS)}")
    unknown = sorted(part.keys() - {kinds[0], "role", "time", "loss"})
    _expect(not unknown, f"{what} has the unknown field {unknown[:1]}")
    value = part[kinds[0]]
    role, time, loss = part.get("role", ""), part.get("time"), part.get("loss", 1.0)
    _expect(isinstance(role, str), f"role of {what} must be a string")
    bare = kinds[0] == "text" and role in MARKS  # a mark needs no text
    _expect(
        isinstance(value, str) and (bare or bool(value)), f"{kinds[0]} of {what} must be a string that is not empty"
    )
    _expect(time is None or _number(time), f"time of {what} must be a number of seconds")
    _expect(_number(loss) and 0 <= loss <= _MAX_LOSS, f"loss of {what} must be a number from 0 to {_MAX_LOSS}")
    rest: dict[str, Any] = {"role": role, "time": None if time is None else float(time), "loss": float(loss)}
    if kinds[0] == "text":
        _expect(value.isprintable() or _encodes(value), f"text of {what} must be Unicode without lone surrogates")
        return Text(text=value, **rest)
    data = read_inside(root, value)
    return Image(data=data, **rest) if kinds[0] == "image" else Video(data=data, **rest)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
