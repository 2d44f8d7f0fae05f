"""Presets by name: the public functions without arguments in the files of `configs/`, each returning a config tree.

`configs/` lies beside the package in a checkout and inside it once installed; both load as `mmgpt.configs`, and so
does `launch/`. Names are read from the source, so that listing them imports nothing.
"""

import ast
import difflib
import importlib
import importlib.util
import sys
from pathlib import Path

from mmgpt.core.config import Config, ConfigError

HERE = Path(__file__).resolve().parent


class PresetError(ConfigError):
    """No such preset, or one that breaks the rules of `configs/`."""


def names() -> list[str]:
    """All presets, sorted."""
    return sorted(_modules(_folder("configs")))


def preset(name: str) -> Config:
    """The config tree of a preset. A name is never a path; an unknown one raises PresetError with close matches."""
    modules = _modules(_folder("configs"))
    if name not in modules:
        near = difflib.get_close_matches(name, modules, 3)
        known = f"Did you mean {' or '.join(near)}?" if near else f"There are: {', '.join(sorted(modules))}."
        raise PresetError(f"no preset {name!r} in configs/. {known}")
    module = importlib.import_module(f"{load_package('configs')}.{modules[name]}")
    config = getattr(module, name)()
    if not isinstance(config, Config):
        raise PresetError(f"configs/{modules[name]}.py: {name}() returned {type(config).__name__}, expected a Config.")
    return config


def load_package(name: str) -> str:
    """Makes `configs` or `launch` importable and returns the name of the module; an installed one already is."""
    package, folder = f"mmgpt.{name}", _folder(name)
    if package not in sys.modules and folder.parent != HERE:
        spec = importlib.util.spec_from_file_location(
            package, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        if spec is None or spec.loader is None:
            raise PresetError(f"{folder}: not a package. Reinstall mmgpt.")
        module = importlib.util.module_from_spec(spec)
        sys.modules[package] = module
        spec.loader.exec_module(module)
    return package


def _folder(name: str) -> Path:
    installed = HERE / name
    return installed if installed.is_dir() else HERE.parent / name


def _modules(folder: Path) -> dict[str, str]:
    """Preset name -> the module of `folder` that defines it."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8"), str(path)).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and _takes_nothing(node.args):
                if node.name in found:
                    raise PresetError(
                        f"configs/: {found[node.name]}.py and {path.stem}.py both define {node.name}(). Rename one."
                    )
                found[node.name] = path.stem
    return found


def _takes_nothing(args: ast.arguments) -> bool:
    return not (args.posonlyargs or args.args or args.kwonlyargs or args.vararg or args.kwarg)
