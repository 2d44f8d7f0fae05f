"""Captions beside media: text and JSON files of the same name, and tables of file and caption."""

import csv
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from mmgpt.data.files import MAX_TEXT_BYTES, FileError, as_text, check_relative, read_inside

CAPTION_SUFFIXES = ("txt", "json")
TABLES = {"captions.tsv": "\t", "captions.csv": ","}
_CAPTION_NAMES = ("caption", "text")
_FILE_NAMES = ("file", "file_name", "filename", "path", "image", "video")

Reject = Callable[[str, str, str], None]
"""Called with key, reason and place of what is not accepted."""


class Pair(NamedTuple):
    """A medium with its caption; `suffix` in lower case without the dot, `place` for error messages."""

    key: str
    caption: str
    meta: dict[str, str]
    suffix: str
    data: bytes
    place: str


def parse(parts: dict[str, bytes]) -> tuple[str, dict[str, str]]:
    """Caption and meta from the bytes of "txt", "json" or both (then the text is the caption, the JSON meta).

    A JSON caption is a table with "caption" or "text"; its other values become meta strings.
    Raises FileError: "not UTF-8", "malformed JSON", "wrong type", "no caption", "empty caption".
    """
    caption, meta = None, {}
    if "json" in parts:
        caption, meta = _from_table(_load_json(parts["json"]))
    if "txt" in parts:
        caption = as_text(parts["txt"])
    if caption is None:
        raise FileError("no caption", 'the JSON has neither "caption" nor "text"')
    caption = caption.strip()
    if not caption:
        raise FileError("empty caption")
    return caption, meta


def _load_json(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(as_text(data))
    except FileError:
        raise
    except (ValueError, RecursionError) as e:  # ValueError: also an integer of thousands of digits
        raise FileError("malformed JSON", str(e)) from e
    if not isinstance(value, dict):
        raise FileError("wrong type", f"the JSON is a {type(value).__name__}, expected a table")
    return value


def _from_table(table: dict[str, Any]) -> tuple[str | None, dict[str, str]]:
    name = next((n for n in _CAPTION_NAMES if table.get(n) is not None), None)
    caption = None if name is None else table[name]
    if caption is not None and not isinstance(caption, str):
        raise FileError("wrong type", f"{name} is a {type(caption).__name__}, expected a string")
    rest = {k: v for k, v in table.items() if k != name and v is not None}
    return caption, {k: v if isinstance(v, str) else json.dumps(v) for k, v in rest.items()}


def pairs(root: Path, media: tuple[str, ...], noun: str, reject: Reject) -> Iterator[Pair]:
    """Every medium below `root` with a suffix in `media` and its caption, in the order of their paths.

    What has no partner, no known suffix or no readable caption goes to `reject`; `noun` names the medium there.
    """
    texts: dict[str, dict[str, str]] = {}
    files: list[str] = []
    for name in _walk(root):
        suffix = _suffix(name)
        if suffix in media:
            files.append(name)
        elif suffix in CAPTION_SUFFIXES:
            texts.setdefault(_stem(name), {})[suffix] = name
        elif name not in TABLES:
            reject(_stem(name), f"unknown file type: {noun}s are {', '.join(media)}", str(root / name))
    table = _table(root, reject)
    for name in files:
        stem, place = _stem(name), str(root / name)
        row = table.pop(name, None) or table.pop(stem, None)
        beside = texts.pop(stem, {})
        try:
            if row is None and not beside:
                raise FileError(f"{noun} without caption")
            read = {s: read_inside(root, n, MAX_TEXT_BYTES) for s, n in beside.items()}
            caption, meta = row if row is not None else parse(read)
            yield Pair(stem, caption, meta, _suffix(name), read_inside(root, name), place)
        except FileError as e:
            reject(stem, str(e), place)
    for stem, beside in texts.items():
        reject(stem, f"caption without {noun}", str(root / next(iter(beside.values()))))
    for name in table:
        reject(name, f"caption without {noun}", str(root))


def _walk(root: Path) -> Iterator[str]:
    for folder, below, names in os.walk(root):
        below.sort()
        start = PurePosixPath(os.path.relpath(folder, root))
        yield from ((start / name).as_posix() for name in sorted(names) if not name.startswith("."))


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix[1:].lower()


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()


def _table(root: Path, reject: Reject) -> dict[str, tuple[str, dict[str, str]]]:
    """File name -> caption and meta from captions.tsv or captions.csv, if there is one."""
    found: dict[str, tuple[str, dict[str, str]]] = {}
    for table, delimiter in TABLES.items():
        if not (root / table).is_file():
            continue
        try:
            # surrogateescape keeps rows apart, so that one bad row does not cost the others
            text = read_inside(root, table).decode("utf-8-sig", "surrogateescape")
        except FileError as e:
            reject(table, str(e), str(root / table))
            continue
        quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting)
        header = ["file", "caption"]
        while True:
            try:
                row = next(rows, None)
                if row is None:
                    break
                if rows.line_num == 1 and row and row[0].lower() in _FILE_NAMES:
                    header = ["file", *row[1:]]
                elif row:
                    name, caption, meta = _row(header, row)
                    if name in found:
                        raise FileError("duplicate key", name)
                    found[name] = (caption, meta)
            except (csv.Error, FileError) as e:
                reason = f"malformed line: {e}" if isinstance(e, csv.Error) else str(e)
                reject(f"{table}:{rows.line_num}", reason, f"{root / table}:{rows.line_num}")
    return found


def _row(header: list[str], row: list[str]) -> tuple[str, str, dict[str, str]]:
    if len(row) != len(header):
        raise FileError("malformed line", f"expected {len(header)} columns ({', '.join(header)}), found {len(row)}")
    as_text("\0".join(row).encode("utf-8", "surrogateescape"))
    caption, meta = _from_table(dict(zip(header[1:], row[1:], strict=True)))
    if not caption or not caption.strip():
        raise FileError("empty caption")
    return check_relative(row[0]), caption.strip(), meta
