"""The config tree: frozen dataclasses whose leaves the command line changes, and their snapshot as JSON.

Every component holds a `Config` next to it with its knobs. A field that holds another config may be annotated
with the base class `Config`; the snapshot keeps the concrete class by name, and only classes of this package load.
"""

import ast
import dataclasses
import difflib
import importlib
import json
import types
import typing
from pathlib import Path
from typing import Any, ClassVar, Literal, dataclass_transform

from mmgpt.core.errors import UserError


class ConfigError(UserError, ValueError):
    """A config that cannot be used; the message says which key, what was found and what to do."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Config:
    """Base of every config. Subclasses become frozen, keyword-only dataclasses by inheritance alone."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)

    def replace(self, **changes: Any) -> typing.Self:
        """A copy with some leaves changed."""
        return dataclasses.replace(self, **changes)


def type_name(config: Config) -> str:
    """`module:Class` of a config, module names below the package."""
    cls = type(config)
    return f"{cls.__module__}:{cls.__qualname__}"


def to_dict(config: Any) -> Any:
    """A config tree as plain JSON values; each config becomes a dict with its class under "type"."""
    if isinstance(config, Config):
        body = {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return {"type": type_name(config), **body}
    if isinstance(config, dict):
        return {str(k): to_dict(v) for k, v in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(v) for v in config]
    if config is None or isinstance(config, (bool, int, float, str)):
        return config
    raise ConfigError(
        f"a config may hold only configs, strings, numbers, lists and dicts, found {type(config).__name__}"
    )


def to_json(config: Config) -> str:
    return json.dumps(to_dict(config), indent=2) + "\n"


def from_json(text: str, where: str = "config") -> Any:
    """The config tree of a snapshot. Unknown classes, unknown or missing keys and wrong types raise ConfigError."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as e:  # of JSON, of its depth, of a number's length
        raise ConfigError(f"{where}: not JSON ({e}). Write it with `mmgpt config PRESET --json FILE`.") from e
    if isinstance(data, dict) and "type" not in data and {"model_type", "architectures"} & data.keys():
        raise ConfigError(f"{where}: of a Hugging Face folder; `mmgpt convert` makes a run folder of it.")
    return _decode(Config, data, where)


def load(path: Path) -> Any:
    """The config tree of a snapshot file."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file. A run folder holds its config as config.json.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path}: not a text file ({e}). Write it with `mmgpt config PRESET --json FILE`.") from e
    return from_json(text, str(path))


def _class(name: str, where: str) -> type[Config]:
    module, _, qualname = name.partition(":")
    if not module.startswith("mmgpt."):
        raise ConfigError(f"{where}: class {name!r} is not part of mmgpt and is not loaded.")
    try:
        found: Any = importlib.import_module(module)
        for part in qualname.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as e:
        raise ConfigError(f"{where}: this mmgpt has no class {name!r}; the file is from another version.") from e
    if not (isinstance(found, type) and issubclass(found, Config)):
        raise ConfigError(f"{where}: {name!r} is not a Config.")
    return found


def _decode(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        if len(options) == 1:
            return _decode(options[0], value, where)
        if isinstance(value, dict) and "type" in value:
            return _decode(Config, value, where)
        for option in options:
            try:
                return _decode(option, value, where)
            except ConfigError:
                continue
        raise ConfigError(f"{where}: {value!r} fits none of {hint}.")
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where}: {value!r} is not one of {', '.join(map(repr, args))}.")
        return value
    if origin in (tuple, list):
        if not isinstance(value, list):
            raise ConfigError(f"{where}: expected a list, found {value!r}.")
        hints = list(args) if origin is tuple and args[-1] is not Ellipsis else [args[0]] * len(value)
        if len(hints) != len(value):
            raise ConfigError(f"{where}: expected {len(hints)} values, found {len(value)}.")
        return origin(_decode(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(zip(hints, value, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: expected a table, found {value!r}.")
        return {k: _decode(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(hint, type) and issubclass(hint, Config):
        return _decode_config(hint, value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{where}: expected {hint.__name__}, found {value!r}.")
    return value


def _decode_config(hint: type[Config], value: Any, where: str) -> Config:
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise ConfigError(f'{where}: expected a table with a "type", found {str(value)[:60]!r}.')
    cls = _class(value["type"], where)
    if not issubclass(cls, hint):
        raise ConfigError(f"{where}: {value['type']} is not a {hint.__name__}.")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for key in value:
        if key != "type" and key not in names:
            near = difflib.get_close_matches(key, names, 1)
            hint_text = f" Did you mean {near[0]!r}?" if near else f" It has {', '.join(names)}."
            raise ConfigError(f"{where}.{key}: {value['type']} has no such key.{hint_text}")
    missing = [n for n in names if n not in value]
    if missing:
        raise ConfigError(f"{where}: {value['type']} misses {', '.join(missing)}; the file is from another version.")
    return cls(**{n: _decode(hints[n], value[n], f"{where}.{n}") for n in names})


def leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted path -> value of every leaf; a config's class is a leaf of its own under `path.type`."""
    if isinstance(config, Config):
        found: dict[str, Any] = {f"{prefix}type": type_name(config)} if prefix else {}
        for f in dataclasses.fields(config):
            value = getattr(config, f.name)
            if isinstance(value, Config) or (isinstance(value, tuple) and any(isinstance(v, Config) for v in value)):
                found |= leaves(value, f"{prefix}{f.name}.")
            else:
                found[f"{prefix}{f.name}"] = value
        return found
    if isinstance(config, tuple):
        return {k: v for i, item in enumerate(config) for k, v in leaves(item, f"{prefix}{i}.").items()}
    return {prefix.rstrip("."): config}


def difference(config: Config, base: Config) -> dict[str, tuple[Any, Any]]:
    """Leaves in which `config` differs from `base`: path -> (base value, value)."""
    ours, theirs = leaves(config), leaves(base)
    return {
        k: (theirs.get(k), ours.get(k))  # a leaf that one side lacks shows as None
        for k in {**theirs, **ours}
        if theirs.get(k) != ours.get(k)
    }


def as_flags(argv: list[str]) -> list[str]:
    """`a.b_c=value` arguments rewritten as `--a.b-c value`, other arguments as they are.

    A tuple may be typed as it is printed: `a=(1, 2)` becomes `--a 1 2`.
    """
    flags: list[str] = []
    for arg in argv:
        key, equals, value = arg.partition("=")
        if equals and not arg.startswith("-") and all(part.isidentifier() for part in key.replace("-", "_").split(".")):
            flags += [f"--{key.replace('_', '-')}", *_values(value)]
        else:
            flags.append(arg)
    return flags


def _values(text: str) -> list[str]:
    if not (text.startswith("(") and text.endswith(")")):
        return [text]
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return [text]
    return [str(value) for value in found] if isinstance(found, tuple) else [str(found)]
