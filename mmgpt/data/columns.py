"""Rows of Parquet files, one at a time and of the columns asked for, read by small batches of a row group.

A damaged row group costs itself alone; a row that is too large or is not UTF-8 costs that row.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow
import pyarrow.parquet
import pyarrow.types

from mmgpt.data.captions import Reject
from mmgpt.data.files import FileError, open_inside, read_inside

MAX_ROW_BYTES = 256 << 20
_BATCH_BYTES, _BATCH_ROWS = 16 << 20, 256
_FAULTS = (pyarrow.ArrowException, OSError, MemoryError, ValueError, OverflowError)
_URL = re.compile(r"https?://", re.IGNORECASE)


class Row(NamedTuple):
    """A row; `key` is its file and number ("train-00000.parquet:17"), `place` the same with the folders of the data."""

    key: str
    place: str
    value: dict[str, Any]


def schema(root: Path, name: str) -> pyarrow.Schema:
    """The columns of a Parquet file. Raises FileError, "damaged Parquet file" for one that is none."""
    with open_inside(root, name) as file:
        try:
            found = _opened(file).schema_arrow
            found.to_string()  # names that are not UTF-8 show only when they are asked for
            return found
        except _FAULTS as e:
            raise e if isinstance(e, FileError) else FileError("damaged Parquet file", _first_line(e)) from e


def rows(root: Path, name: str, columns: list[str], reject: Reject, max_bytes: int = MAX_ROW_BYTES) -> Iterator[Row]:
    """The rows of a Parquet file in order; those over `max_bytes` go to `reject`, and so does what is damaged."""
    path, number = root / name, 0
    try:
        with open_inside(root, name) as file:
            opened = _opened(file)
            for group in range(opened.num_row_groups):
                end = number + opened.metadata.row_group(group).num_rows
                try:
                    for batch in _batches(opened, group, columns):
                        for i in range(batch.num_rows):
                            number += 1
                            key, place = f"{name}:{number}", f"{path}, row {number}"
                            try:
                                yield Row(key, place, _values(batch.slice(i, 1), max_bytes))
                            except FileError as e:
                                reject(key, str(e), place)
                except FileError as e:
                    reject(
                        f"{name}:{number + 1}", f"{e}; rows {number + 1} to {end} are lost", f"{path}, group {group}"
                    )
                number = end
    except FileError as e:
        reject(name, str(e), str(path))


def _opened(file: BinaryIO) -> pyarrow.parquet.ParquetFile:
    try:
        # Page by page, through a buffer: otherwise a column of a row group would be held whole.
        return pyarrow.parquet.ParquetFile(file, page_checksum_verification=True, buffer_size=1 << 20, pre_buffer=False)
    except _FAULTS as e:
        raise FileError("damaged Parquet file", _first_line(e)) from e


def _batches(opened: pyarrow.parquet.ParquetFile, group: int, columns: list[str]) -> Iterator[pyarrow.RecordBatch]:
    # Of all columns, not of those wanted: to ask for the size of one ends the process when its metadata is damaged.
    meta = opened.metadata.row_group(group)
    count = max(1, min(_BATCH_ROWS, _BATCH_BYTES * meta.num_rows // max(1, meta.total_byte_size)))
    try:
        yield from opened.iter_batches(count, row_groups=[group], columns=columns, use_threads=False)
    except _FAULTS as e:
        raise FileError("damaged row group", _first_line(e)) from e


def _values(row: pyarrow.RecordBatch, max_bytes: int) -> dict[str, Any]:
    if row.nbytes > max_bytes:  # before it is copied into Python's objects
        raise FileError("too many bytes", f"a row of {row.nbytes} is over the cap of {max_bytes}")
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError as e:
        raise FileError("not UTF-8", f"byte {e.start} of a text: {e.object[e.start : e.start + 8]!r}") from e
    except _FAULTS as e:
        raise FileError("unreadable row", _first_line(e)) from e


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).partition("\n")[0]


Fetched = Callable[[str], bytes]
"""The local copy of what lies at a URL."""


def no_copy(url: str) -> bytes:
    """For data without local copies. Raises FileError "URL without a local copy"."""
    raise FileError("URL without a local copy", url[:200])


def picture(value: Any, root: Path, fetched: Fetched = no_copy) -> bytes:
    """The bytes of a picture's cell: bytes, a path below `root`, or {bytes, path}, of which the bytes count.

    A URL is never opened: `fetched` gives its local copy. Raises FileError, "no image" for an empty cell.
    """
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None or value == "" or value == b"":
        raise FileError("no image")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise FileError("wrong type", f"a {type(value).__name__}, expected an image's bytes or path")
    return fetched(value) if _URL.match(value) else read_inside(root, value)


def is_picture(kind: pyarrow.DataType) -> bool:
    """Whether a column of this type may hold pictures: bytes, texts (paths), or tables of "bytes" and "path"."""
    if pyarrow.types.is_struct(kind):
        return "bytes" in {field.name for field in kind}
    return is_bytes(kind) or is_text(kind)


def is_bytes(kind: pyarrow.DataType) -> bool:
    """Whether a column of this type holds bytes."""
    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind) or pyarrow.types.is_binary_view(kind)


def is_text(kind: pyarrow.DataType) -> bool:
    """Whether a column of this type holds texts."""
    if pyarrow.types.is_dictionary(kind):
        return is_text(kind.value_type)
    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_string_view(kind)


def is_list(kind: pyarrow.DataType) -> bool:
    """Whether a column of this type holds lists."""
    types = pyarrow.types
    return (
        types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind) or types.is_list_view(kind)
    )


def is_scalar(kind: pyarrow.DataType) -> bool:
    """Whether a column of this type becomes meta: texts, numbers, truth values."""
    return (
        is_text(kind)
        or pyarrow.types.is_integer(kind)
        or pyarrow.types.is_floating(kind)
        or pyarrow.types.is_boolean(kind)
    )
