"""Formats of raw data, one file each. A module here is a format: its name is what `mmgpt data import` takes.

Each has `documents(path, reject)`, which yields what it finds and calls `reject(key, reason, place)` for what it does
not accept.
"""

import dataclasses
import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, cast

from mmgpt.core.document import Document
from mmgpt.core.errors import UserError


class SourceError(UserError, ValueError):
    """Raw data that cannot be imported at all; the message says what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found(Document):
    """A document and the file, line or offset where it was found.

    Of a `partial` one, images that do not decode are left out and listed one by one; it stays while an image and a
    text are left. Any other document is refused with its first fault.
    """

    place: str
    partial: bool = False


class Source(Protocol):
    """What a module here offers."""

    def documents(self, path: Path, reject: Callable[[str, str, str], None]) -> Iterator[Found]: ...


def names() -> list[str]:
    """The formats, in alphabetical order."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Source:
    """The module of a format. Raises SourceError for an unknown name."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise SourceError(f"no format {name!r}.{hint} There are {', '.join(names())}.")
    return cast(Source, importlib.import_module(f"{__name__}.{name}"))


def described(name: str) -> str:
    """What a format reads, in one line."""
    return (inspect.getdoc(load(name)) or "").partition("\n")[0]


def require_folder(path: Path, format: str) -> None:
    """Raises SourceError unless `path` is a folder."""
    if not path.is_dir():
        state = "is a file" if path.exists() else "no such folder"
        raise SourceError(f"{path}: {state}; the format {format!r} reads a folder.")
