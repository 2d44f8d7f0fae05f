"""Rows of a table with a header line, one at a time: a bad row costs itself alone, and no row fills the memory."""

import csv
from collections.abc import Iterator
from typing import NamedTuple, TextIO

from mmgpt.data.captions import Reject
from mmgpt.data.files import FileError, as_text

MAX_ROW = 1 << 20


class Row(NamedTuple):
    """A row as column -> value; `place` for error messages."""

    values: dict[str, str]
    place: str


def rows(file: TextIO, name: str, required: tuple[str, ...], reject: Reject) -> Iterator[Row]:
    """The rows of comma-separated values, each with all columns of the header; `name` names the table.

    Open the file with errors="surrogateescape": then one row that is not UTF-8 does not cost the others.
    Rows go to `reject` for "not UTF-8", "malformed line". Raises FileError for the header: "wrong columns" if one of
    `required` is not in it, or what a row is rejected for.
    """
    reader = csv.reader(iter(lambda: file.readline(MAX_ROW), ""))
    header = [column.strip() for column in _next(reader) or []]
    if lacking := [column for column in required if column not in header]:
        raise FileError("wrong columns", f"no {', '.join(lacking)} among {', '.join(header)[:200]!r}")
    while True:
        line = reader.line_num + 1
        try:
            row = _next(reader)
            if row is None:
                return
            if row and len(row) != len(header):
                raise FileError("malformed line", f"expected {len(header)} columns, found {len(row)}")
            if row:
                yield Row(dict(zip(header, row, strict=True)), f"{name}:{line}")
        except FileError as e:
            reject(f"{name.rpartition('/')[2]}:{line}", str(e), f"{name}:{line}")


def _next(reader: Iterator[list[str]]) -> list[str] | None:
    try:
        row = next(reader, None)
    except csv.Error as e:  # a field over csv.field_size_limit(), such as one whose quote never closes
        raise FileError("malformed line", str(e)) from e
    if row is not None:
        as_text("\0".join(row).encode("utf-8", "surrogateescape"))
    return row
