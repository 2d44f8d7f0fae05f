"""Image edits: a picture, an instruction, and the picture after it.

    edits.jsonl (.json)      {"source": "a.jpg", "instruction": "make it night", "target": "b.jpg"} a line
    shard-00/0000123/        as InstructPix2Pix: prompt.json {"edit": "..."}, 71_0.jpg and 71_1.jpg, 96_0.jpg ...
    train-00000.parquet      input_image, edit_prompt, edited_image; the pictures as {bytes, path}, bytes or a path

Other names are read too: see BEFORE, WORDS and AFTER. Paths are relative to the folder of the file. The picture before
and the instruction have the role "user", the picture after "assistant". The key is "<file>:<number>" or
"<folder>/<seed>"; other texts, numbers and truth values become meta.
"""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow

from mmgpt.core.document import Image
from mmgpt.data import columns, texts
from mmgpt.data.captions import Reject
from mmgpt.data.files import MAX_TEXT_BYTES, FileError, as_text, read_inside
from mmgpt.data.objects import LINES, Object, files_below, objects, parse, scalars
from mmgpt.data.sources import Found, SourceError

BEFORE = (
    "source_image",
    "input_image",
    "original_image",
    "source_img",
    "src_img",
    "before",
    "source",
    "input",
)
WORDS = ("instruction", "edit_instruction", "edit_prompt", "edit", "prompt")
AFTER = (
    "target_image",
    "edited_image",
    "output_image",
    "target_img",
    "edited_img",
    "after",
    "target",
    "edited",
    "output",
)
_IMAGES = (".jpg", ".jpeg", ".png", ".webp")
_SEEDS = "seeds.json"  # InstructPix2Pix's list of its folders


def documents(path: Path, reject: Reject) -> Iterator[Found]:
    """Documents of the files in the order of their names, then of the folders. Raises SourceError if there is none."""
    root, names = files_below(path, (".json", ".parquet", *LINES))
    found = False
    for name in names:
        if name == _SEEDS:
            continue
        found = True
        for item in _rows(root, name, reject) if name.endswith(".parquet") else objects(root, name, reject):
            document = _document(item, root, reject)
            if document is not None:
                yield document
    for folder in _folders(path) if path.is_dir() else ():
        found = True
        yield from _seeds(path, folder, reject)
    if not found:
        raise SourceError(
            f"{path}: holds no .jsonl, .json or .parquet file and no folder with a prompt.json, which 'edits' reads."
        )


def _rows(root: Path, name: str, reject: Reject) -> Iterator[columns.Row]:
    try:
        kinds: dict[str, pyarrow.DataType] = {field.name: field.type for field in columns.schema(root, name)}
        chosen = [next((n for n in group if n in kinds), None) for group in (BEFORE, WORDS, AFTER)]
        if None in chosen:
            raise FileError("unknown columns", f"{', '.join(kinds)[:200]}; expected source, instruction, target")
    except FileError as e:
        reject(name, str(e), str(root / name))
        return
    wanted = [n for n, kind in kinds.items() if n in chosen or columns.is_scalar(kind)]
    yield from columns.rows(root, name, wanted, reject)


def _document(item: Object | columns.Row, root: Path, reject: Reject) -> Found | None:
    values = item.value
    try:
        before, words, after = (_named(values, names) for names in (BEFORE, WORDS, AFTER))
        pictures = [columns.picture(values[name], root) for name in (before, after)]
        meta = scalars(values, without=(before, words, after))
        return _edit(item.key, pictures[0], values[words], pictures[1], meta, item.place)
    except FileError as e:
        reject(item.key, str(e), item.place)
        return None


def _named(values: dict[str, Any], names: tuple[str, ...]) -> str:
    """Which of the names is there. Raises FileError "incomplete edit"."""
    found = next((name for name in names if values.get(name) is not None), None)
    if found is None:
        raise FileError("incomplete edit", f"none of {', '.join(names)}")
    return found


def _edit(key: str, before: bytes, words: Any, after: bytes, meta: dict[str, str], place: str) -> Found:
    if not isinstance(words, str):
        raise FileError("wrong type", f"the instruction is a {type(words).__name__}, expected a string")
    instruction = texts.segments(texts.checked(words.strip()), "user")
    segments = (Image(data=before, role="user"), *instruction, Image(data=after, role="assistant"))
    return Found(key=key, segments=segments, meta=meta, place=place)


def _folders(root: Path) -> Iterator[str]:
    """The folders below `root` that hold a prompt.json, in the order of their paths."""
    for folder, below, names in os.walk(root):
        below.sort()
        if "prompt.json" in names:
            yield PurePosixPath(os.path.relpath(folder, root)).as_posix()


def _seeds(root: Path, folder: str, reject: Reject) -> Iterator[Found]:
    """The edits of one folder: one instruction, and two pictures for each seed."""
    place = root / folder
    names = {PurePosixPath(name).stem: name for name in sorted(os.listdir(place)) if name.lower().endswith(_IMAGES)}
    try:
        prompt = parse(as_text(read_inside(root, f"{folder}/prompt.json", MAX_TEXT_BYTES)))
        if not isinstance(prompt, dict):
            raise FileError("wrong type", "prompt.json is no table")
        seeds = sorted({stem[:-2] for stem in names if stem.endswith(("_0", "_1"))})
        if not seeds:
            raise FileError("incomplete edit", "no pictures beside prompt.json")
    except FileError as e:
        reject(folder, str(e), str(place))
        return
    for seed in seeds:
        key = f"{folder}/{seed}"
        try:
            pictures = [_picture(root, folder, names, f"{seed}_{i}") for i in (0, 1)]
            yield _edit(key, pictures[0], prompt.get("edit"), pictures[1], scalars(prompt, ("edit",)), str(place))
        except FileError as e:
            reject(key, str(e), str(place))


def _picture(root: Path, folder: str, names: dict[str, str], stem: str) -> bytes:
    if stem not in names:
        raise FileError("incomplete edit", f"no picture {stem}")
    return read_inside(root, f"{folder}/{names[stem]}")
