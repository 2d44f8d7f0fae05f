"""MMC4 as published: shards of documents as JSON lines, with the images that were fetched, joined by their names.

    docs_no_face_shard_0_v2.jsonl      or .jsonl.zip, one document a line: text_list, image_info, url
    images/b9040a0dbb22.jpg            loose, or in docs_no_face_shard_0_v2_images/, or in
    images_0.tar   images_1.zip        archives beside the shards or in images/, members read in place

An image comes before the text that it is matched with (`matched_text_index`). URLs are never fetched. An image without
a local copy, or with one that does not decode, is listed and left out; the document stays while an image and a text
are left. The key is "<shard>/<line>"; `url` and `could_have_url_duplicate` become meta.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mmgpt.core.document import Image, Segment, Text
from mmgpt.data.captions import Reject
from mmgpt.data.files import MAX_TEXT_BYTES, FileError, as_text, check_relative, read_inside
from mmgpt.data.sources import Found, SourceError
from mmgpt.data.tars import Tars, archives
from mmgpt.data.zips import FAULTS, Zip, Zips

_IMAGES = ("jpg", "jpeg", "png", "webp", "gif")
_DOCS = (".jsonl", ".jsonl.zip")
_META = ("url", "could_have_url_duplicate")
NO_COPY = "image without a local copy"


def documents(path: Path, reject: Reject) -> Iterator[Found]:
    """Documents in the order of the lines. Raises SourceError if there is no shard of documents."""
    root = path if path.is_dir() else path.parent
    shards = sorted(p for p in path.iterdir() if p.name.endswith(_DOCS)) if path.is_dir() else [path]
    if not shards or not path.exists():
        raise SourceError(
            f"{path}: holds no .jsonl or .jsonl.zip file; the format 'mmc4' reads a shard or a folder of them."
        )
    with contextlib.closing(_Images(root, reject)) as images:
        for shard in shards:
            if not shard.is_file():
                reject(shard.name, "not a regular file", str(shard))
                continue
            try:
                for number, line in _lines(shard, reject):
                    document = _document(line, shard, number, images, reject)
                    if document is not None:
                        yield document
            except FileError as e:
                reject(shard.name, str(e), str(shard))


class _Images:
    """The images of a data set by name: loose files first, then members of archives."""

    def __init__(self, root: Path, reject: Reject) -> None:
        folders = [folder for folder in (root, root / "images") if folder.is_dir()]
        zips = [p for f in folders for p in sorted(f.glob("*.zip")) if p.is_file() and not p.name.endswith(_DOCS)]
        self.root = root
        self._stores = (
            Tars([p for f in folders for p in archives(f, reject)], _IMAGES, reject),
            Zips(zips, _IMAGES, reject),
        )

    def read(self, name: str, shard: str) -> bytes:
        """The bytes of an image. Raises FileError, "image without a local copy" where there is none."""
        check_relative(name)
        for folder in ("images", f"{shard}_images"):
            try:
                return read_inside(self.root, f"{folder}/{name}")
            except FileError as e:
                if e.reason != "missing file":
                    raise
        for store in self._stores:
            if name in store:
                return store.read(name)
        raise FileError(NO_COPY, name[:200])

    def close(self) -> None:
        for store in self._stores:
            store.close()


def _lines(shard: Path, reject: Reject) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each line. FileError "damaged archive", after the lines before the damage."""
    if not shard.name.endswith(".zip"):
        with open(shard, "rb") as file:
            yield from _bounded(file, shard, reject)
        return
    with Zip(shard) as archive:
        members = list(archive.members(("jsonl",), reject))
        if not members:
            raise FileError("no documents", "the archive has no .jsonl member that is read")
        for other in members[1:]:  # a published archive holds one shard; lines of several would have the same keys
            reject(f"{_name(shard)}/{other.filename}", "second shard in an archive: unpack it", str(shard))
        try:
            with archive.open(members[0]) as stream:
                yield from _bounded(stream, shard, reject)
        except FAULTS as e:
            raise FileError("damaged archive", f"{members[0].filename[:200]!r}: {e}") from e


def _bounded(file: IO[bytes], shard: Path, reject: Reject) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := file.readline(MAX_TEXT_BYTES):
        number += 1
        if len(line) == MAX_TEXT_BYTES and not line.endswith(b"\n"):
            reject(f"{_name(shard)}/{number}", f"line over {MAX_TEXT_BYTES} bytes", f"{shard}:{number}")
            while (rest := file.readline(MAX_TEXT_BYTES)) and not rest.endswith(b"\n"):
                pass
        elif line.strip():
            yield number, line


def _name(shard: Path) -> str:
    return shard.name.partition(".jsonl")[0]


def _document(line: bytes, shard: Path, number: int, images: _Images, reject: Reject) -> Found | None:
    key, place = f"{_name(shard)}/{number}", f"{shard}:{number}"
    try:
        item = _parsed(line)
        texts, entries = item.get("text_list"), item.get("image_info")
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise FileError("wrong type", "text_list must be a list of strings")
        if not isinstance(entries, list):
            raise FileError("wrong type", "image_info must be a list")
        before: dict[int, list[Image]] = {}
        for i, entry in enumerate(entries):
            try:
                name, index = _entry(entry, len(texts))
                image = Image(data=images.read(name, _name(shard)))
                before.setdefault(index, []).append(image)
            except FileError as e:
                reject(f"{key}/image {i}", str(e), place)
        segments: list[Segment] = []
        for i, text in enumerate(texts):
            segments += before.get(i, [])
            if text.strip():
                segments.append(Text(text=text.strip()))
        if not before or not any(isinstance(s, Text) for s in segments):
            raise FileError("no image and text left", f"of {len(entries)} images and {len(texts)} texts")
    except FileError as e:
        reject(key, str(e), place)
        return None
    meta = {
        name: value if isinstance(value := item[name], str) else json.dumps(value) for name in _META if name in item
    }
    return Found(key=key, segments=tuple(segments), meta=meta, place=place, partial=True)


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        item = json.loads(as_text(line))
    except FileError:
        raise
    except (ValueError, RecursionError) as e:
        raise FileError("malformed JSON", str(e)) from e
    if not isinstance(item, dict):
        raise FileError("wrong type", "the line is no JSON object")
    return item


def _entry(entry: Any, texts: int) -> tuple[str, int]:
    """Name of an image and the number of the text that it comes before."""
    name = entry.get("image_name") if isinstance(entry, dict) else None
    index = entry.get("matched_text_index") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not name:
        raise FileError("wrong type", "image_name must be a string")
    if type(index) is not int or not 0 <= index < texts:
        raise FileError("wrong type", f"matched_text_index of {name[:200]!r} must be a number below {texts}")
    return name, index
