"""Plain text: .txt files, JSON lines and Parquet, one file or all below a folder.

    essays/one.txt            a document
    part-00000.jsonl(.gz)     {"text": "...", "id": "...", "url": "...", ...} a line, or "content" for "text"
    train-00000.parquet       a column `text` or `content`

The key is `id`, else `url`, else the file (and the number in it); other texts, numbers and truth values become meta.
A long text becomes several segments, cut between paragraphs, lines or sentences: joined, they are the text.
"""

from collections.abc import Iterator
from pathlib import Path

import pyarrow

from mmgpt.data import columns, objects, texts
from mmgpt.data.captions import Reject
from mmgpt.data.files import MAX_TEXT_BYTES, FileError, as_text, read_inside
from mmgpt.data.sources import Found, SourceError

NAMES = ("text", "content")
KEYS = ("id", "url")
MAX_KEY = 512
_SUFFIXES = (".txt", ".parquet", *objects.LINES)
_UNREAD = (".jsonl.zst", ".json.zst", ".jsonl.xz", ".jsonl.bz2", ".txt.gz")


def documents(path: Path, reject: Reject) -> Iterator[Found]:
    """Documents in the order of the files' paths. Raises SourceError if there is no file of text."""
    root, names = objects.files_below(path, (*_SUFFIXES, *_UNREAD), deep=True)
    if not any(name.lower().endswith(_SUFFIXES) for name in names):
        raise SourceError(
            f"{path}: holds no {', '.join(_SUFFIXES)} file; the format 'text' reads one, or all below a folder."
        )
    for name in names:
        if name.lower().endswith(_UNREAD):
            reject(name, "compressed file: decompress it; of compressed ones .jsonl.gz is read", str(root / name))
        else:
            yield from _file(root, name, reject)


def _file(root: Path, name: str, reject: Reject) -> Iterator[Found]:
    place = str(root / name)
    try:
        if name.lower().endswith(".txt"):
            text = texts.checked(as_text(read_inside(root, name, MAX_TEXT_BYTES)))
            yield Found(key=name[: -len(".txt")], segments=texts.segments(text), place=place)
            return
        if name.lower().endswith(".parquet"):
            found = columns.rows(root, name, wanted(columns.schema(root, name)), reject)
        else:
            found = objects.objects(root, name, reject)
    except FileError as e:
        reject(name, str(e), place)
        return
    for item in found:
        document = of_values(item, reject)
        if document is not None:
            yield document


def wanted(schema: pyarrow.Schema) -> list[str]:
    """The columns of a Parquet file of texts to read. Raises FileError "unknown columns" if there is no text."""
    if not any(name in schema.names and columns.is_text(schema.field(name).type) for name in NAMES):
        raise FileError("unknown columns", f"{', '.join(schema.names)[:200]}; expected text or content")
    return [field.name for field in schema if columns.is_scalar(field.type)]


def of_values(item: objects.Object | columns.Row, reject: Reject) -> Found | None:
    """The document of an object or a row, or None after a `reject`."""
    key, named = item.key, next((n for n in KEYS if item.value.get(n) not in (None, "")), "")
    if isinstance(found := item.value.get(named), (str, int)) and len(str(found)) <= MAX_KEY:
        key = str(found)
    try:
        name = next((n for n in NAMES if item.value.get(n) is not None), None)
        if name is None:
            raise FileError("no text", f"neither {' nor '.join(NAMES)}")
        text = item.value[name]
        if not isinstance(text, str):
            raise FileError("wrong type", f"{name} is a {type(text).__name__}, expected a string")
        segments = texts.segments(texts.checked(text))
    except FileError as e:
        reject(key, str(e), item.place)
        return None
    meta = objects.scalars(item.value, without=(name, named))
    return Found(key=key, segments=segments, meta=meta, place=item.place)
