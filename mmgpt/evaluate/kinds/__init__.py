"""Kinds of evaluation, one file each. A module here is a kind: its name is what `mmgpt eval --tasks NAME=...` takes.

Each has `USAGE`, what follows its name, and `prepare(arguments, options, subject)`, which checks all that can be
checked before the model is loaded and returns what then runs. The formats in `evaluate.annotations` are kinds as well.
"""

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, cast

from mmgpt.evaluate import annotations
from mmgpt.evaluate.subject import Options, Subject
from mmgpt.evaluate.tasks import Outcome, TaskError

Job = Callable[[], Outcome]
"""An evaluation that is ready to run."""


class Kind(Protocol):
    """What a module here offers."""

    USAGE: str

    def prepare(self, arguments: list[str], options: Options, subject: Subject) -> Job: ...


def names() -> list[str]:
    """All kinds, in alphabetical order."""
    return sorted([m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")] + annotations.names())


def usage() -> str:
    """How each kind is written, one a line, with what it is."""
    lines = []
    for name in names():
        if name in annotations.names():
            files, words = f"{annotations.load(name).FILES},FOLDER", annotations.described(name)
        else:
            module = _module(name)
            files, words = module.USAGE, (inspect.getdoc(module) or "").partition("\n")[0]
        lines.append(f"  {name}={files}  {words}")
    return "\n".join(lines)


def prepare(spec: str, options: Options, subject: Subject) -> Job:
    """The evaluation that `kind=argument,...` asks for; TaskError for an unknown kind."""
    name, equals, rest = spec.partition("=")
    if not equals or name not in names():
        near = difflib.get_close_matches(name, names(), 1)
        hint = f" Did you mean {near[0]}=...?" if near else ""
        what = "is no folder of tokenised prompts and no kind of task" if not equals else f"names no task {name!r}"
        raise TaskError(f"--tasks {spec}: {what}.{hint} Give folders, or:\n{usage()}")
    arguments = rest.split(",")
    if not all(arguments):
        raise TaskError(f"--tasks {spec}: expected {name}={_usage_of(name)}, separated by commas.")
    if name in annotations.names():
        from mmgpt.evaluate.kinds._annotated import prepare as annotated

        return annotated(name, arguments, options, subject)
    return _module(name).prepare(arguments, options, subject)


def _usage_of(name: str) -> str:
    return f"{annotations.load(name).FILES},FOLDER" if name in annotations.names() else _module(name).USAGE


def _module(name: str) -> Kind:
    return cast(Kind, importlib.import_module(f"{__name__}.{name}"))


def one_path(path: str, what: str) -> Path:
    """A path that is there; TaskError otherwise."""
    if not Path(path).exists():
        raise TaskError(f"{path}: no such {what}.")
    return Path(path)
