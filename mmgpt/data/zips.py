"""Zip archives read in place: members by name from the central directory, nothing extracted, sizes capped.

The sizes in the directory are checked before a byte is inflated, and inflating stops at them: an archive cannot make
more of itself than it says.
"""

import stat
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from mmgpt.data.captions import Reject
from mmgpt.data.files import MAX_FILE_BYTES, FileError, check_relative

MAX_RATIO = 200
"""Inflated over stored size; JSON lines of text stay below 20, pictures at 1. Deflate alone can make 1,032."""
_FREE = 1 << 20
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 1


class Zip:
    """An open archive. Raises FileError "damaged archive" if there is no central directory or it is broken."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as e:
            raise FileError("damaged archive", str(e)) from e

    def __enter__(self) -> "Zip":
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def members(self, suffixes: tuple[str, ...], reject: Reject) -> Iterator[zipfile.ZipInfo]:
        """The regular members with a suffix in `suffixes`, in the order of the directory.

        What is encrypted, a link, unsafe, too large or inflates out of proportion goes to `reject`.
        """
        for info in self._zip.infolist():
            if info.is_dir() or PurePosixPath(info.filename).suffix[1:].lower() not in suffixes:
                continue
            try:
                check(info)
                yield info
            except FileError as e:
                place = f"{self.path}, {info.filename[:200]!r} at offset {info.header_offset}"
                reject(f"{self.path.stem}/{info.filename[:200]}", str(e), place)

    def open(self, info: zipfile.ZipInfo) -> IO[bytes]:
        """The member as a stream, which ends with the size in the directory. It may raise what `FAULTS` names."""
        check(info)
        return self._zip.open(info)

    def read(self, info: zipfile.ZipInfo, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        """The bytes of a member. Raises FileError: those of `check`, "too many bytes", "damaged archive"."""
        if info.file_size > max_bytes:
            raise FileError("too many bytes", f"{info.file_size} is over the cap of {max_bytes}")
        try:
            with self.open(info) as stream:
                return stream.read(info.file_size)
        except FAULTS as e:
            raise FileError("damaged archive", f"{info.filename[:200]!r}: {e}") from e


FAULTS = (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, NotImplementedError)
"""What reading a damaged member raises."""


def check(info: zipfile.ZipInfo) -> None:
    """Raises FileError for a member that is not read.

    "unsafe path", "not a regular file", "encrypted member", "unknown compression", "too many bytes",
    "inflates out of proportion".
    """
    check_relative(info.filename)
    mode = info.external_attr >> 16  # of Unix; 0 where another system wrote the archive
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
        raise FileError("not a regular file", f"mode {mode:o}")
    if info.flag_bits & _ENCRYPTED:
        raise FileError("encrypted member")
    if info.compress_type not in _METHODS:
        raise FileError("unknown compression", f"method {info.compress_type}; store or deflate it")
    if info.file_size > MAX_FILE_BYTES:
        raise FileError("too many bytes", f"{info.file_size} is over the cap of {MAX_FILE_BYTES}")
    if info.file_size > _FREE and info.file_size > MAX_RATIO * info.compress_size:
        raise FileError("inflates out of proportion", f"{info.compress_size} bytes to {info.file_size}")
