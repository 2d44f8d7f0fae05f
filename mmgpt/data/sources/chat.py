"""Conversations about pictures as LLaVA and chat models are trained on: a .json or .jsonl file, or all of a folder.

    [{"id": "000000033471", "image": "coco/train2017/000000033471.jpg", "conversations": [
      {"from": "human", "value": "<image>\\nWhat colour is the bus?"}, {"from": "gpt", "value": "Red."}]}, ...]
    {"images": ["kea.jpg"], "messages": [
      {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}, ...]}

Paths are relative to the folder of the file. A picture stands where its <image> is, or its part of a list; a line break
beside <image> belongs to the mark. Turns get the roles "user" and "assistant"; a system prompt has no role. The key is
"<file>:<number>", since published sets repeat their ids; `id` and other texts and numbers become meta.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mmgpt.core.document import Image, Segment
from mmgpt.data import texts
from mmgpt.data.captions import Reject
from mmgpt.data.files import FileError, read_inside
from mmgpt.data.objects import LINES, Object, files_below, objects, scalars
from mmgpt.data.sources import Found, SourceError

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": ""}
_MARK = re.compile(r"\n?<image>\n?")
_TURNS = (("conversations", "from", "value"), ("messages", "role", "content"))


def documents(path: Path, reject: Reject) -> Iterator[Found]:
    """Documents in the order of files and items. Raises SourceError if there is no such file."""
    root, names = files_below(path, (".json", *LINES))
    if not names:
        raise SourceError(f"{path}: holds no .json or .jsonl file; the format 'chat' reads one or a folder of them.")
    for name in names:
        for item in objects(root, name, reject):
            try:
                segments = tuple(_segments(item, root))
            except FileError as e:
                reject(item.key, str(e), item.place)
                continue
            meta = scalars(item.value, without=("image",))
            yield Found(key=item.key, segments=segments, meta=meta, place=item.place)


def _segments(item: Object, root: Path) -> list[Segment]:
    """The turns of an item, each picture read at its place."""
    listed = item.value.get("images", item.value.get("image"))
    paths = [] if listed is None else listed if isinstance(listed, list) else [listed]
    turns = [turn for number, turn in enumerate(_turns(item.value), 1) for turn in _parts(*turn, f"turn {number}")]
    asked = sum(isinstance(part, _Picture) and part.path is None for _, part in turns)
    if asked != len(paths):
        raise FileError("number of images", f"{asked} <image> marks, {len(paths)} images")
    given = iter(paths)
    found: list[Segment] = []
    for role, part in turns:
        if isinstance(part, _Picture):
            path = next(given) if part.path is None else part.path
            found.append(Image(data=read_inside(root, _string(path, "the path of an image")), role=role))
        else:
            found += texts.segments(texts.checked(part), role)
    return found


class _Picture(NamedTuple):
    """A picture in a turn: its path, or None for the next of the item's list."""

    path: Any = None


def _turns(value: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Role and content of each turn."""
    field, speaker, content = next((names for names in _TURNS if names[0] in value), ("", "", ""))
    turns = value.get(field)
    if not isinstance(turns, list) or not turns:
        raise FileError("no conversation", 'neither "conversations" nor "messages" is a list of turns')
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise FileError("wrong type", f"turn {number} is a {type(turn).__name__}, expected an object")
        role = _string(turn.get(speaker), f'"{speaker}" of turn {number}')
        if role not in ROLES:
            raise FileError("unknown role", f"{role[:60]!r} of turn {number}; there are {', '.join(ROLES)}")
        yield ROLES[role], turn.get(content)


def _parts(role: str, content: Any, what: str) -> Iterator[tuple[str, str | _Picture]]:
    """Role and text or picture of each part of a turn that is not blank; FileError if all are."""
    pieces = content if isinstance(content, list) else [{"type": "text", "text": content}]
    empty = True
    for piece in pieces:
        kind = piece.get("type") if isinstance(piece, dict) else None
        if kind == "text":
            words = _MARK.split(_string(piece.get("text"), f"the text of {what}"))
            marked = [part for word in words for part in (_Picture(), word)][1:]
        elif kind in ("image", "image_url"):
            marked = [_Picture(_path(piece))]
        else:
            raise FileError("unknown part", f"of the type {str(kind)[:60]!r} in {what}; there are text and image")
        for part in marked:
            if isinstance(part, _Picture) or part.strip():
                empty = False
                yield role, part
    if empty:
        raise FileError("empty turn", what)


def _path(piece: dict[str, Any]) -> Any:
    found = next((piece[name] for name in ("image", "path", "image_url", "url") if piece.get(name) is not None), None)
    return found.get("url", "") if isinstance(found, dict) else found


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise FileError("wrong type", f"{what} is a {type(value).__name__}, expected a string")
    return value
