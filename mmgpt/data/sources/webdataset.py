"""WebDataset archives: a .tar file or a folder of them, whose members share a key and differ in suffix.

    00000.tar:  000000012.jpg  000000012.txt  000000012.json    (jpg jpeg png webp gif mp4; txt, json or both)

Members are read in place by their offset, nothing is extracted, linked or opened by name. The key is
"<archive>/<member key>"; the caption is the .txt, or "caption" or "text" of the .json, whose other values become meta.
A truncated archive gives the documents before the cut.
"""

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from mmgpt.core.document import Image, Segment, Text, Video
from mmgpt.data.captions import CAPTION_SUFFIXES, Reject, parse
from mmgpt.data.files import MAX_FILE_BYTES, FileError, check_relative
from mmgpt.data.sources import Found, SourceError

_IMAGES = ("jpg", "jpeg", "png", "webp", "gif")
_VIDEOS = ("mp4",)
_READ = (*_IMAGES, *_VIDEOS, *CAPTION_SUFFIXES)
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class _Member(NamedTuple):
    key: str
    suffix: str
    offset: int
    size: int


def documents(path: Path, reject: Reject) -> Iterator[Found]:
    """Documents of caption and medium, archive by archive. Raises SourceError if there is no archive."""
    if path.is_dir():
        files = sorted(path.glob("*.tar"))
        for file in sorted(path.iterdir()):
            if file.name.endswith(_COMPRESSED):
                reject(file.name, "compressed archive: decompress it, members are read by offset", str(file))
    else:
        files = [path] if path.is_file() and not path.name.endswith(_COMPRESSED) else []
    if not files:
        raise SourceError(f"{path}: holds no uncompressed .tar file; the format 'webdataset' reads one or a folder.")
    for file in files:
        if file.is_file():
            yield from _archive(file, reject)
        else:
            reject(file.name, "not a regular file", str(file))


def _archive(path: Path, reject: Reject) -> Iterator[Found]:
    group: list[_Member] = []
    broken = False
    with open(path, "rb") as file:
        try:
            for member in _members(file, path, reject):
                if group and member.key != group[0].key:
                    yield from _sample(file, path, group, reject)
                    group = []
                group.append(member)
        except FileError as e:
            broken = True
            reject(path.stem, str(e), str(path))
        complete = {m.suffix for m in group} & set(CAPTION_SUFFIXES) and {m.suffix for m in group} - {*CAPTION_SUFFIXES}
        if group and (complete or not broken):  # half a document at a cut belongs to the line of the cut
            yield from _sample(file, path, group, reject)


def _members(file: BinaryIO, path: Path, reject: Reject) -> Iterator[_Member]:
    """The regular members in order; FileError "truncated archive" or "damaged archive" naming the offset."""
    end = path.stat().st_size
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # it would grow with the archive
                if info.offset_data + info.size > end:
                    raise FileError("truncated archive", f"{info.name!r} at offset {info.offset} ends after the file")
                member = _member(info, path, reject)
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


def _member(info: tarfile.TarInfo, path: Path, reject: Reject) -> _Member | None:
    if info.isdir():
        return None
    folder, _, base = info.name.rpartition("/")
    stem, _, suffix = base.partition(".")
    key = f"{folder}/{stem}" if folder else stem
    try:
        check_relative(info.name)
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or info.issparse():
            raise FileError("not a regular file", f"tar type {info.type!r}")
        if not stem or suffix.lower() not in _READ:
            return None
        if info.size > MAX_FILE_BYTES:
            raise FileError("too many bytes", f"{info.size} is over the cap of {MAX_FILE_BYTES}")
    except FileError as e:
        reject(f"{path.stem}/{key}", str(e), f"{path}, {info.name!r} at offset {info.offset}")
        return None
    return _Member(PurePosixPath(key).as_posix(), suffix.lower(), info.offset_data, info.size)


def _sample(file: BinaryIO, path: Path, group: list[_Member], reject: Reject) -> Iterator[Found]:
    key, place = f"{path.stem}/{group[0].key}", f"{path}, data at offset {group[0].offset}"
    media = [m for m in group if m.suffix not in CAPTION_SUFFIXES]
    texts = [m for m in group if m.suffix in CAPTION_SUFFIXES]
    try:
        if len({m.suffix for m in group}) < len(group) or len(media) > 1:
            raise FileError("duplicate key", f"members {', '.join(m.suffix for m in group)}")
        if not media:
            raise FileError("caption without image")
        if not texts:
            raise FileError("image without caption" if media[0].suffix in _IMAGES else "video without caption")
        caption, meta = parse({m.suffix: _read(file, m) for m in texts})
        data = _read(file, media[0])
    except FileError as e:
        reject(key, str(e), place)
        return
    medium: Segment = Image(data=data) if media[0].suffix in _IMAGES else Video(data=data)
    yield Found(key=key, segments=(Text(text=caption), medium), meta=meta, place=place)


def _read(file: BinaryIO, member: _Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)
