"""WebDataset archives: a .tar file or a folder of them, whose members share a key and differ in suffix.

    00000.tar:  000000012.jpg  000000012.txt  000000012.json    (jpg jpeg png webp gif mp4; txt, json or both)

Members are read in place by their offset, nothing is extracted, linked or opened by name. The key is
"<archive>/<member key>"; the caption is the .txt, or "caption" or "text" of the .json, whose other values become meta.
A truncated archive gives the documents before the cut.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from mmgpt.core.document import Image, Segment, Text, Video
from mmgpt.data.captions import CAPTION_SUFFIXES, Reject, parse
from mmgpt.data.files import FileError
from mmgpt.data.sources import Found, SourceError
from mmgpt.data.tars import Member, archives, members, read

_IMAGES = ("jpg", "jpeg", "png", "webp", "gif")
_VIDEOS = ("mp4",)
_READ = (*_IMAGES, *_VIDEOS, *CAPTION_SUFFIXES)


def documents(path: Path, reject: Reject) -> Iterator[Found]:
    """Documents of caption and medium, archive by archive. Raises SourceError if there is no archive."""
    files = archives(path, reject)
    if not files and not (path.is_dir() and any(path.glob("*.tar"))):
        raise SourceError(f"{path}: holds no uncompressed .tar file; the format 'webdataset' reads one or a folder.")
    for file in files:
        yield from _archive(file, reject)


def _archive(path: Path, reject: Reject) -> Iterator[Found]:
    group: list[Member] = []
    broken = False
    with open(path, "rb") as file:
        try:
            for member in members(file, path, _READ, reject):
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


def _sample(file: BinaryIO, path: Path, group: list[Member], reject: Reject) -> Iterator[Found]:
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
        caption, meta = parse({m.suffix: read(file, m) for m in texts})
        data = read(file, media[0])
    except FileError as e:
        reject(key, str(e), place)
        return
    medium: Segment = Image(data=data) if media[0].suffix in _IMAGES else Video(data=data)
    yield Found(key=key, segments=(Text(text=caption), medium), meta=meta, place=place)
