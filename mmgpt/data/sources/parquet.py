"""Parquet as Hugging Face publishes it: pictures with captions, interleaved documents (OBELICS), plain text.

    image, caption      the picture: image, img, jpg, jpeg, png or webp, as {bytes, path}, bytes, or a path
                        the caption: caption, text, txt or sentence, also as a list, of which the first counts
    images, texts       lists of one length: at each place a picture or a text, the other being null
    text                or content: as the format 'text' reads it

Paths are relative to the folder of the file. A URL is never fetched: it is looked up in images/ beside, the output
folder of img2dataset (NNNNN.tar, NNNNN.parquet). An interleaved document stays while an image and a text are left;
each image that it lost is listed. The key is "<file>:<row>"; other texts, numbers and truth values become meta.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow

from mmgpt.core.document import Image, Segment, Text
from mmgpt.data import columns, texts
from mmgpt.data.captions import Reject
from mmgpt.data.downloads import Downloads
from mmgpt.data.files import FileError
from mmgpt.data.importing import NOTHING_LEFT
from mmgpt.data.objects import files_below, scalars
from mmgpt.data.sources import Found, SourceError, text

IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp")
CAPTIONS = ("caption", "text", "txt", "sentence", "captions", "sentences")
LAYOUTS = (
    f"a picture ({', '.join(IMAGES)}) and a caption ({', '.join(CAPTIONS)}); "
    "lists images and texts of one length (OBELICS); a text (text, content)"
)


class Layout(NamedTuple):
    """The columns to read, and what makes a document of a row."""

    wanted: list[str]
    document: Callable[[columns.Row, Path, columns.Fetched, Reject], Found | None]


def documents(path: Path, reject: Reject) -> Iterator[Found]:
    """Documents in the order of files and rows. Raises SourceError for no file, or one of columns it does not know."""
    root, names = files_below(path, (".parquet",))
    if not names:
        raise SourceError(f"{path}: holds no .parquet file; the format 'parquet' reads one or a folder of them.")
    fetched: columns.Fetched | None = None
    known = False
    for name in names:
        try:
            schema = columns.schema(root, name)
            layout = recognised(schema)
            if layout is None and not known:
                raise SourceError(
                    f"{root / name}: has the columns {_listed(schema)}. The format 'parquet' reads: {LAYOUTS}."
                )
            if layout is None:
                raise FileError("unknown columns", f"{_listed(schema)}, unlike the files before")
        except FileError as e:
            reject(name, str(e), str(root / name))
            continue
        known = True
        if fetched is None:
            fetched = Downloads(root / "images", reject) if (root / "images").is_dir() else columns.no_copy
        for row in columns.rows(root, name, layout.wanted, reject):
            document = layout.document(row, root, fetched, reject)
            if document is not None:
                yield document


def _listed(schema: pyarrow.Schema) -> str:
    return ", ".join(f"{field.name} ({str(field.type)[:60]})" for field in schema)[:1000]


def recognised(schema: pyarrow.Schema) -> Layout | None:
    """The layout of a file by its columns."""
    kinds = {field.name: field.type for field in schema}
    others = [name for name, kind in kinds.items() if columns.is_scalar(kind)]
    if _holds(kinds.get("images"), columns.is_picture) and _holds(kinds.get("texts"), columns.is_text):
        return Layout([*others, "images", "texts"], _interleaved)
    image = next((name for name in IMAGES if name in kinds and columns.is_picture(kinds[name])), None)
    caption = next((name for name in CAPTIONS if name in kinds and _is_caption(kinds[name])), None)
    if image and caption:
        wanted = list(dict.fromkeys([*others, image, caption]))
        return Layout(wanted, lambda row, root, fetched, reject: _pair(row, image, caption, root, fetched, reject))
    try:
        return Layout(text.wanted(schema), lambda row, root, fetched, reject: text.of_values(row, reject))
    except FileError:
        return None


def _holds(kind: pyarrow.DataType | None, item: Callable[[pyarrow.DataType], bool]) -> bool:
    return kind is not None and columns.is_list(kind) and item(kind.value_type)


def _is_caption(kind: pyarrow.DataType) -> bool:
    return columns.is_text(kind) or _holds(kind, columns.is_text)


def _pair(
    row: columns.Row, image: str, caption: str, root: Path, fetched: columns.Fetched, reject: Reject
) -> Found | None:
    try:
        found = row.value[caption]
        captions = [words.strip() for words in (found if isinstance(found, list) else [found]) if words]
        if not any(captions):
            raise FileError("empty caption")
        first, *rest = filter(None, captions)
        segments = (Text(text=texts.checked(first)), Image(data=columns.picture(row.value[image], root, fetched)))
    except FileError as e:
        reject(row.key, str(e), row.place)
        return None
    meta = scalars(row.value, without=(image, caption)) | ({"captions": json.dumps(rest)} if rest else {})
    return Found(key=row.key, segments=segments, meta=meta, place=row.place)


def _interleaved(row: columns.Row, root: Path, fetched: columns.Fetched, reject: Reject) -> Found | None:
    images, words = row.value["images"] or [], row.value["texts"] or []
    try:
        if len(images) != len(words):
            raise FileError("lists of two lengths", f"{len(images)} images, {len(words)} texts")
        if any(image is not None and word is not None for image, word in zip(images, words, strict=True)):
            raise FileError("wrong layout", "a place has an image and a text; one of them must be null")
        segments: list[Segment] = []
        for i, (image, word) in enumerate(zip(images, words, strict=True)):
            if word is not None and word.strip():
                segments += texts.segments(texts.checked(word))
            elif image is not None:
                segments += _image(f"{row.key}/image {i}", image, root, fetched, row.place, reject)
        if not any(isinstance(s, Text) for s in segments) or not any(isinstance(s, Image) for s in segments):
            raise FileError(NOTHING_LEFT, f"of {len(images) - images.count(None)} images")
    except FileError as e:
        reject(row.key, str(e), row.place)
        return None
    meta = scalars(row.value, without=())
    return Found(key=row.key, segments=tuple(segments), meta=meta, place=row.place, partial=True)


def _image(key: str, image: Any, root: Path, fetched: columns.Fetched, place: str, reject: Reject) -> list[Image]:
    try:
        return [Image(data=columns.picture(image, root, fetched))]
    except FileError as e:
        reject(key, str(e), place)
        return []
