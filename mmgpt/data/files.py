"""Reading the files of a raw data set: inside its folder only, with size caps, each failure with a short reason."""

import os
import re
import stat
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from mmgpt.core.errors import UserError

MAX_FILE_BYTES = 1 << 30
MAX_TEXT_BYTES = 64 << 20
_SCHEME = re.compile(r"[A-Za-z][\w+.-]*:")


class FileError(UserError, ValueError):
    """A file that is not read. `reason` is a short fixed phrase, `detail` says what was found."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def check_relative(name: str) -> str:
    """`name` if it is a plain relative path below its folder; FileError "unsafe path" for anything else."""
    path = PurePosixPath(name)
    foreign = _SCHEME.match(name) or "\\" in name or not name.isprintable()
    if not path.parts or foreign or path.is_absolute() or ".." in path.parts:
        raise FileError("unsafe path", f"{name[:200]!r} must be relative, below the folder, and no URL")
    return name


def read_inside(root: Path, name: str, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """The bytes of a regular file below `root`.

    Raises FileError like `open_inside`, and "too many bytes".
    """
    with open_inside(root, name) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise FileError("too many bytes", f"{size} is over the cap of {max_bytes}")
        try:
            return file.read()
        except OSError as e:
            raise FileError("unreadable", str(e)) from e


def open_inside(root: Path, name: str) -> BinaryIO:
    """A regular file below `root`, open for reading.

    Raises FileError: "unsafe path", "missing file", "link out of the folder", "not a regular file", "unreadable".
    """
    path = os.path.join(root, check_relative(name))
    try:
        found = _stat_inside(os.fspath(root), path)  # before opening: opening a pipe waits for its writer
        if not stat.S_ISREG(found.st_mode):
            raise FileError("not a regular file")
        return open(path, "rb")
    except FileNotFoundError as e:
        raise FileError("missing file", name) from e
    except OSError as e:
        raise FileError("unreadable", str(e)) from e


def _stat_inside(root: str, path: str) -> os.stat_result:
    """The status of the file behind `path`; FileError if a link on the way below `root` leads out of it."""
    part = root
    found = None
    for name in PurePosixPath(path).relative_to(root).parts:
        part = os.path.join(part, name)
        found = os.lstat(part)
        if stat.S_ISLNK(found.st_mode):
            target = os.path.realpath(path)
            if not PurePosixPath(target).is_relative_to(os.path.realpath(root)):
                raise FileError("link out of the folder", f"to {target}")
            return os.stat(target)
    assert found is not None
    return found


def as_text(data: bytes) -> str:
    """UTF-8 bytes as text, a byte order mark removed; FileError "not UTF-8" otherwise."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise FileError("not UTF-8", f"byte {e.start}: {data[e.start : e.start + 8]!r}") from e
