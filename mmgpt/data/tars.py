"""Tar archives read in place: members by their offset, nothing extracted, linked or opened by a name of the archive.

`members` walks the headers of one archive, `Tars` finds single members of many archives by name.
"""

import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple, Self

from mmgpt.data.captions import Reject
from mmgpt.data.files import MAX_FILE_BYTES, FileError, check_relative

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_DESCRIBING = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, *(b"x", b"g", b"X"))  # the last three are pax's
_MAX_DESCRIPTION = 1 << 20


class Member(NamedTuple):
    """A regular file of an archive: `key` is its name up to the first dot of the last part, `suffix` what follows."""

    name: str
    key: str
    suffix: str
    offset: int
    size: int


def archives(path: Path, reject: Reject) -> list[Path]:
    """The uncompressed archives: `path` itself or those in the folder. Compressed and odd ones go to `reject`."""
    if not path.is_dir():
        return [path] if path.is_file() and not path.name.endswith(COMPRESSED) else []
    found = []
    for file in sorted(path.iterdir()):
        if file.name.endswith(COMPRESSED):
            reject(file.name, "compressed archive: decompress it, members are read by offset", str(file))
        elif file.name.endswith(".tar"):
            if file.is_file():
                found.append(file)
            else:
                reject(file.name, "not a regular file", str(file))
    return found


class _Bounded(tarfile.TarInfo):
    """A header whose size tarfile may follow: it reads long names and the like whole, of any size they claim."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        info = super().frombuf(buf, encoding, errors)
        if info.size < 0 or (info.type in _DESCRIBING and info.size > _MAX_DESCRIPTION):
            raise tarfile.ReadError(f"a header of type {info.type!r} claims {info.size} bytes")
        return info


def members(file: BinaryIO, path: Path, suffixes: tuple[str, ...], reject: Reject) -> Iterator[Member]:
    """The regular members with a suffix in `suffixes`, in order; what is unsafe or too large goes to `reject`.

    Raises FileError "truncated archive" or "damaged archive", naming the offset, after the members before it.
    """
    end = path.stat().st_size
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=_Bounded) as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # it would grow with the archive
                if info.size < 0:  # set by a header of its own; it would lead back, to the same member for ever
                    raise FileError("damaged archive", f"{info.name!r} at offset {info.offset} has {info.size} bytes")
                if info.offset_data + info.size > end:
                    raise FileError("truncated archive", f"{info.name!r} at offset {info.offset} ends after the file")
                member = _member(info, path, suffixes, reject)
                if member is not None:
                    yield member
            stopped = tar.offset
    except (tarfile.TarError, OSError, ValueError, OverflowError) as e:
        if isinstance(e, FileError):
            raise
        raise FileError("damaged archive", f"at offset {file.tell()}: {e}") from e
    file.seek(stopped)
    if (mark := file.read(tarfile.BLOCKSIZE)) != bytes(tarfile.BLOCKSIZE):
        kind = "truncated archive" if len(mark) < tarfile.BLOCKSIZE else "damaged archive"
        raise FileError(kind, f"no member and no end mark at offset {stopped}")


def _member(info: tarfile.TarInfo, path: Path, suffixes: tuple[str, ...], reject: Reject) -> Member | None:
    if info.isdir():
        return None
    folder, _, base = info.name.rpartition("/")
    stem, _, suffix = base.partition(".")
    key = f"{folder}/{stem}" if folder else stem
    try:
        check_relative(info.name)
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or info.issparse():
            raise FileError("not a regular file", f"tar type {info.type!r}")
        if not stem or suffix.lower() not in suffixes:
            return None
        if info.size > MAX_FILE_BYTES:
            raise FileError("too many bytes", f"{info.size} is over the cap of {MAX_FILE_BYTES}")
    except FileError as e:
        reject(f"{path.stem}/{key}", str(e), f"{path}, {info.name!r} at offset {info.offset}")
        return None
    return Member(info.name, PurePosixPath(key).as_posix(), suffix.lower(), info.offset_data, info.size)


def read(file: BinaryIO, member: Member, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """The bytes of a member. Raises FileError "too many bytes" over `max_bytes`, "truncated archive" if some lack."""
    if member.size > max_bytes:
        raise FileError("too many bytes", f"{member.size} is over the cap of {max_bytes}")
    file.seek(member.offset)
    data = file.read(member.size)
    if len(data) < member.size:
        raise FileError("truncated archive", f"{member.name!r} ends after the file")
    return data


def base_name(member: Member) -> str:
    """The last part of a member's name, `b9040a0dbb22.jpg` of `shard_0/b9040a0dbb22.jpg`."""
    return PurePosixPath(member.name).name


class Tars:
    """Members of the archives of a folder, found by a name and read on demand.

    Holds where each member lies, not its bytes. `name` makes the name that a member is found by. Of members of one
    name the first counts; one of another size goes to `reject`, as does what `members` does not accept.
    """

    def __init__(
        self, paths: list[Path], suffixes: tuple[str, ...], reject: Reject, name: Callable[[Member], str] = base_name
    ) -> None:
        self._found: dict[str, tuple[Path, int, int]] = {}
        self._open: tuple[Path, BinaryIO] | None = None
        for path in paths:
            with open(path, "rb") as file:
                try:
                    for member in members(file, path, suffixes, reject):
                        self._add(name(member), path, member, reject)
                except FileError as e:
                    reject(path.stem, str(e), str(path))

    def _add(self, name: str, path: Path, member: Member, reject: Reject) -> None:
        first = self._found.setdefault(name, (path, member.offset, member.size))
        if first[2] != member.size:
            reject(f"{path.stem}/{member.key}", f"duplicate key: {name}", f"{path}, data at offset {member.offset}")

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def __len__(self) -> int:
        return len(self._found)

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def read(self, name: str, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        """The bytes of a member. Raises FileError "missing file" for an unknown name, otherwise like `read`."""
        if name not in self._found:
            raise FileError("missing file", name[:200])
        path, offset, size = self._found[name]
        if self._open is None or self._open[0] != path:  # documents name neighbours: one archive at a time stays open
            self.close()
            self._open = (path, open(path, "rb"))  # noqa: SIM115  # closed by the next archive or close()
        return read(self._open[1], Member(name, name, "", offset, size), max_bytes)

    def close(self) -> None:
        """Closes the archive that was read last."""
        if self._open is not None:
            self._open[1].close()
            self._open = None
