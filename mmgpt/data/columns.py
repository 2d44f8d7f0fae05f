"""Rows of Parquet files, one at a time and of the columns asked for, read by small batches of a row group.

A damaged row group costs itself alone; a row that is too large or is not UTF-8 costs that row. What is held is
a page of each column and a few rows: a value that a file stores once and names often is counted before it is repeated.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
import pyarrow.types

from mmgpt.data.captions import Reject
from mmgpt.data.files import FileError, open_inside, read_inside

MAX_ROW_BYTES = 256 << 20
_BATCH_ROWS = 8
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
        return _opened(file).schema_arrow


def rows(root: Path, name: str, columns: list[str], reject: Reject, max_bytes: int = MAX_ROW_BYTES) -> Iterator[Row]:
    """The rows of a Parquet file in order; those over `max_bytes` go to `reject`, and so does what is damaged."""
    path, number = root / name, 0
    try:
        with open_inside(root, name) as file:
            opened = _opened(file, columns)
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
                    lost = f"rows {number + 1} to {end} are lost"
                    reject(f"{name}:{number + 1}", f"{e}; {lost}", f"{path}, row group {group}")
                number = end
    except FileError as e:
        reject(name, str(e), str(path))


def _opened(file: BinaryIO, columns: Sequence[str] = ()) -> pyarrow.parquet.ParquetFile:
    # Page by page, through a buffer: otherwise a column of a row group would be held whole.
    options: dict[str, Any] = {"page_checksum_verification": True, "buffer_size": 1 << 20, "pre_buffer": False}
    try:
        opened = pyarrow.parquet.ParquetFile(file, **options)
        leaves = [opened.schema.column(i) for i in range(len(opened.schema))] if columns else []
        # The lists of a row are of any length, so their values stay with the dictionary until they are counted.
        listed = [x.path for x in leaves if x.max_repetition_level and x.physical_type == "BYTE_ARRAY"]
        listed = [path for path in listed if path.partition(".")[0] in columns]
        return pyarrow.parquet.ParquetFile(file, read_dictionary=listed, **options) if listed else opened
    except _FAULTS as e:
        raise FileError("damaged Parquet file", _first_line(e)) from e


def _batches(opened: pyarrow.parquet.ParquetFile, group: int, columns: list[str]) -> Iterator[pyarrow.RecordBatch]:
    # The metadata of a column would tell more, but to ask for it ends the process when it is damaged.
    try:
        yield from opened.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False)
    except _FAULTS as e:
        raise FileError("damaged row group", _first_line(e)) from e


def _values(row: pyarrow.RecordBatch, max_bytes: int) -> dict[str, Any]:
    try:
        size = sum(map(_size, row.columns))
        if size > max_bytes:
            raise FileError("too many bytes", f"a row of {size} is over the cap of {max_bytes}")
        return row.to_pylist()[0]
    except FileError:
        raise
    except UnicodeDecodeError as e:
        raise FileError("not UTF-8", f"byte {e.start} of a text: {e.object[e.start : e.start + 8]!r}") from e
    except _FAULTS as e:
        raise FileError("unreadable row", _first_line(e)) from e


def _size(values: pyarrow.Array) -> int:
    """Bytes that the values take as objects of Python; an entry of a dictionary counts each time that it is named."""
    pointers, kind = 8 * len(values), values.type
    if pyarrow.types.is_dictionary(kind):
        lengths = pyarrow.compute.call_function("binary_length", [values.dictionary])
        return pointers + int(np.nansum(lengths.take(values.indices).to_numpy(zero_copy_only=False)))
    if is_list(kind):
        return pointers + _size(values.flatten())
    if pyarrow.types.is_struct(kind):
        return pointers + sum(map(_size, values.flatten()))
    return pointers + values.nbytes


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
