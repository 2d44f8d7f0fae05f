"""Annotation files of public benchmarks, one format a file, all read into one form.

A module here is a format: its name is the task's name on the command line. It has `FILES`, the files it takes in words;
`ANSWERED`, how an answer is judged ("captions", "vqa", "words" or "choice"); and `read(*files)`. Nothing is guessed:
an entry that is not as its format says is an error that names file, entry, and what was expected.
"""

import dataclasses
import importlib
import inspect
import json
import pkgutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from mmgpt.core.errors import UserError
from mmgpt.data.files import FileError, check_relative

Value = TypeVar("Value")


class AnnotationError(UserError, ValueError):
    """An annotation file that is not as its format says; the message names the entry and what was expected."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Annotation:
    """One question about one medium, or one medium to be described.

    `media`: file of the picture or clip, relative to the media folder; `question`: "" for captions; `answers`: what
    people said, or the captions; `choices`: the options of a multiple choice, of which `answers` then holds the right
    one; `kind`: sort of question, by which scores are also given; `split`: part of the data set, where the file says.
    """

    key: str
    media: str
    question: str = ""
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    kind: str = ""
    split: str = ""


class Format(Protocol):
    """What a module here offers."""

    FILES: str
    ANSWERED: str

    def read(self, *files: Path) -> tuple[Annotation, ...]: ...


def names() -> list[str]:
    """The formats, in alphabetical order."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Format:
    """The module of a format that is there."""
    return cast(Format, importlib.import_module(f"{__name__}.{name}"))


def described(name: str) -> str:
    """What a format is, in one line."""
    return (inspect.getdoc(load(name)) or "").partition("\n")[0]


def read(name: str, files: Sequence[Path]) -> tuple[Annotation, ...]:
    """The annotations of files in a format; AnnotationError where there are none, or a key stands twice."""
    module = load(name)
    least = len(inspect.signature(module.read).parameters)
    if len(files) != least:
        raise AnnotationError(f"{name} takes {module.FILES}; {len(files)} files given.")
    found = module.read(*files)
    if not found:
        raise AnnotationError(f"{files[0]}: holds no annotation.")
    seen: set[str] = set()
    for annotation in found:
        if annotation.key in seen:
            raise AnnotationError(f"{files[0]}: the key {annotation.key!r} stands twice; each must be there once.")
        seen.add(annotation.key)
    return found


def text_of(path: Path) -> str:
    """A UTF-8 file; AnnotationError otherwise."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise AnnotationError(f"{path}: cannot be read as UTF-8 text ({e}). Give the annotation file.") from e


def json_of(path: Path) -> Any:
    """The value in a JSON file; AnnotationError otherwise."""
    try:
        return json.loads(text_of(path))
    except (ValueError, RecursionError) as e:
        raise AnnotationError(f"{path}: not JSON ({e}). Give the annotation file as it was published.") from e


def table(value: Any, where: str) -> dict[str, Any]:
    """`value` if it is a JSON object."""
    if not isinstance(value, dict):
        raise AnnotationError(f"{where}: expected an object, found {_short(value)}.")
    return value


def field(entry: Any, name: str, kind: type[Value] | tuple[type, ...], where: str) -> Value:
    """A field of an object, of a type; AnnotationError says what is there."""
    entry = table(entry, where)
    if name not in entry:
        raise AnnotationError(f"{where}: has no {name!r}; it holds {', '.join(map(repr, entry)) or 'nothing'}.")
    value = entry[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(_KINDS.get(k, k.__name__) for k in kinds)
        raise AnnotationError(f"{where}: {name} must be {wanted}, found {_short(value)}.")
    return value


def entries(value: Any, name: str, path: Path) -> Iterable[tuple[str, Any]]:
    """(place, entry) of the list `name` of a file's top object; of the top list itself for ""."""
    found = field(value, name, list, str(path)) if name else value
    if not isinstance(found, list):
        raise AnnotationError(f"{path}: expected a list, found {_short(found)}.")
    return ((f"{path}, {name or 'entry'}[{i}]", entry) for i, entry in enumerate(found))


def words_of(entry: Any, name: str, where: str) -> str:
    """A text field that is not blank, its ends trimmed."""
    text = field(entry, name, str, where).strip()
    if not text:
        raise AnnotationError(f"{where}: {name} is empty.")
    return text


def media_of(name: str, where: str) -> str:
    """A file name that stays below the media folder."""
    try:
        return check_relative(name)
    except FileError as e:
        raise AnnotationError(f"{where}: {e}.") from e


_KINDS = {str: "a string", int: "a whole number", list: "a list", dict: "an object"}


def _short(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:60]!r}"
