"""JSON objects of a raw data set, one at a time: lines of .jsonl files and items of the list in a .json file.

A file may be larger than the memory. A bad object costs itself alone, as long as its end can be found.
"""

import codecs
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from mmgpt.data.captions import Reject
from mmgpt.data.files import MAX_TEXT_BYTES, FileError, as_text, open_inside

LINES = (".jsonl", ".jsonl.gz", ".json.gz")
_CHUNK = 1 << 20
_NOT_BLANK = re.compile(r"[^ \t\r\n]")
_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[{}\[\]"]|[^\s,{}\[\]"]++', re.DOTALL)
"""A whole string, a bracket, the quote that opens a string without end, or anything else but blanks and commas."""


class Object(NamedTuple):
    """An object; `key` is its file and number ("train.jsonl:17"), `place` the same with the folders of the data."""

    key: str
    place: str
    value: dict[str, Any]


def files_below(path: Path, suffixes: tuple[str, ...], *, deep: bool = False) -> tuple[Path, list[str]]:
    """A folder and the files in it (with `deep`, also in its subfolders) with a suffix, in the order of their paths.

    A file gives its folder and itself, so that what it names is looked for beside it.
    """
    if not path.is_dir():
        path = path.resolve()  # a link that the user names is followed, one that the data holds is not
        return path.parent, [path.name] if path.name.lower().endswith(suffixes) else []
    found = []
    for folder, below, names in os.walk(path):
        below[:] = sorted(n for n in below if not n.startswith(".")) if deep else []
        start = PurePosixPath(os.path.relpath(folder, path))
        shown = sorted(n for n in names if not n.startswith(".") and n.lower().endswith(suffixes))
        found += [(start / name).as_posix() for name in shown]
    return path, found


def objects(root: Path, name: str, reject: Reject, max_bytes: int = MAX_TEXT_BYTES) -> Iterator[Object]:
    """The objects of a file of lines, if its name says so, else of a JSON list or of objects one after the other."""
    place = root / name
    try:
        with open_inside(root, name) as file:
            found = (_lines if name.endswith(LINES) else _items)(file, name, max_bytes)
            for number, value in found:
                where = f"{place}:{number}" if name.endswith(LINES) else f"{place}, item {number}"
                if isinstance(value, FileError):
                    reject(f"{name}:{number}", str(value), where)
                elif not isinstance(value, dict):
                    reject(f"{name}:{number}", f"wrong type: a {type(value).__name__}, expected an object", where)
                else:
                    yield Object(f"{name}:{number}", where, value)
    except FileError as e:
        reject(name, str(e), str(place))


def parse(text: str) -> Any:
    """A JSON value. Raises FileError "malformed JSON", also for NaN, deep nesting and numbers of many digits."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except FileError:
        raise
    except (ValueError, RecursionError, OverflowError) as e:
        raise FileError("malformed JSON", str(e)) from e


def _no_constant(name: str) -> None:
    raise FileError("malformed JSON", f"{name} is no JSON number")


def scalars(values: dict[str, Any], without: tuple[str, ...]) -> dict[str, str]:
    """Texts, numbers and truth values as meta strings; lists, tables and what `without` names are left out."""
    kept = {k: v for k, v in values.items() if k not in without and isinstance(v, (str, int, float))}
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in kept.items()}


def _lines(file: BinaryIO, name: str, max_bytes: int) -> Iterator[tuple[int, Any]]:
    """Number and value, or fault, of each line that is not blank. FileError "damaged archive" for a broken .gz."""
    stream: Any = gzip.GzipFile(fileobj=file) if name.endswith(".gz") else file
    number = 0
    try:
        while line := stream.readline(max_bytes):
            number += 1
            if len(line) == max_bytes and not line.endswith(b"\n"):
                yield number, FileError(f"over {max_bytes} bytes", "the line is passed over")
                while (rest := stream.readline(max_bytes)) and not rest.endswith(b"\n"):
                    pass
            elif line.strip():
                yield number, _value(line)
    except (OSError, EOFError, zlib.error) as e:
        raise FileError("damaged archive" if name.endswith(".gz") else "unreadable", f"after line {number}: {e}") from e


def _value(data: bytes | str) -> Any:
    try:
        return parse(as_text(data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data))
    except FileError as e:
        return e


def _items(file: BinaryIO, name: str, max_bytes: int) -> Iterator[tuple[int, Any]]:
    """Number and value, or fault, of each item of the top-level list, or of the values that follow one another.

    Raises FileError after the last item whose end can be found.
    """
    text = _Window(file, max_bytes)
    listed = text.skip("[")
    number = 0
    while (text.peek() != "]") if listed else text.peek():
        if number and listed and not text.skip(","):
            raise FileError("malformed JSON", f"no comma and no end of the list after item {number}")
        number += 1
        yield number, _value(text.value(f"item {number}"))
    if listed:
        text.skip("]")
        if text.peek():
            raise FileError("malformed JSON", f"the list ends after item {number}, the file goes on")


class _Window:
    """The part of a text file that is looked at, read on as needed and let go of behind."""

    def __init__(self, file: BinaryIO, most: int) -> None:
        self._file, self._most = file, most
        # surrogateescape keeps items apart, so that one that is not UTF-8 does not cost the others
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
        self._text, self._at = "", 0

    def peek(self) -> str:
        """The next character that is not blank, "" at the end."""
        while (found := _NOT_BLANK.search(self._text, self._at)) is None:
            self._at = len(self._text)
            if not self._more():
                return ""
        self._at = found.start()
        return found[0]

    def skip(self, wanted: str) -> bool:
        """Goes past `wanted` if it comes next."""
        found = self.peek() == wanted
        self._at += found
        return found

    def value(self, what: str) -> str:
        """The text of the next value, well formed or not; FileError if its end is missing or too far."""
        depth, length = 0, 0
        while True:
            token = _TOKEN.search(self._text, self._at + length)
            if token is None or token[0] == '"' or token.end() == len(self._text):  # it may go on after the window
                if len(self._text) - self._at > self._most:
                    raise FileError(f"over {self._most} characters", f"{what}, where the file is left")
                if self._more():
                    continue
                if token is None or token[0] == '"':
                    raise FileError("malformed JSON", f"the file ends within {what}")
            length = token.end() - self._at
            depth += (token[0] in "{[") - (token[0] in "}]")
            if depth <= 0:
                start, self._at = self._at, self._at + length
                return self._text[start : self._at]

    def _more(self) -> bool:
        held = self._text[self._at :]
        data = self._file.read(max(_CHUNK, len(held)))  # doubled, since an open string is looked at from its start
        self._text, self._at = held + self._decode(data, not data), 0
        return bool(data)
