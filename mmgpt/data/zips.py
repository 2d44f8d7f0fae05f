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
        self.close()

    def close(self) -> None:
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


class Zips:
    """Members of several archives, found by the last part of their name and read on demand.

    Holds where each member lies, not its bytes. Of members of one name the first counts; one of another size goes to
    `reject`, as do broken archives and what `Zip.members` does not accept.
    """

    def __init__(self, paths: list[Path], suffixes: tuple[str, ...], reject: Reject) -> None:
        self._found: dict[str, tuple[Path, zipfile.ZipInfo]] = {}
        self._open: Zip | None = None
        for path in paths:
            try:
                with Zip(path) as archive:
                    for info in archive.members(suffixes, reject):
                        name = PurePosixPath(info.filename).name
                        if self._found.setdefault(name, (path, info))[1].file_size != info.file_size:
                            place = f"{path}, {info.filename[:200]!r} at offset {info.header_offset}"
                            reject(f"{path.stem}/{info.filename[:200]}", f"duplicate key: {name}", place)
            except FileError as e:
                reject(path.stem, str(e), str(path))

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def read(self, name: str, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        """The bytes of a member. Raises FileError "missing file" for an unknown name, otherwise like `Zip.read`."""
        if name not in self._found:
            raise FileError("missing file", name[:200])
        path, info = self._found[name]
        if self._open is None or self._open.path != path:
            self.close()
            self._open = Zip(path)
        return self._open.read(info, max_bytes)

    def close(self) -> None:
        """Closes the archive that was read last."""
        if self._open is not None:
            self._open.close()
            self._open = None


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
