"""Grammars by name: a file of this folder whose class holds a `Config` is one."""

import ast
import difflib
import functools
import importlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmgpt.tokens.grammars.grammar import GrammarConfig


def names() -> list[str]:
    """All grammars, sorted. Names are read from the source, so that listing them imports nothing."""
    return sorted(_classes())


def config(name: str) -> "GrammarConfig":
    """The default config of a grammar; GrammarError with close matches for an unknown name."""
    from mmgpt.tokens.grammars.grammar import GrammarError

    if name not in _classes():
        near = difflib.get_close_matches(name, _classes(), 2) or names()
        raise GrammarError(f"no grammar {name!r}; there is {' or '.join(near)}.")
    module = importlib.import_module(f"{__name__}.{name}")
    return getattr(module, _classes()[name]).Config()


@functools.cache
def _classes() -> dict[str, str]:
    """Grammar -> its class."""
    found: dict[str, str] = {}
    for path in Path(__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8"), str(path)).body:
            if isinstance(node, ast.ClassDef) and any(
                isinstance(inner, ast.ClassDef) and inner.name == "Config" for inner in node.body
            ):
                found[path.stem] = node.name
    return found
