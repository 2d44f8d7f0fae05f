"""The rules of the house, read from the source with `ast`: who may import whom, what is never called, sizes and names.

Each rule is a function (relative path, text) -> list of faults, a fault being "path:line: what, what to do".
"""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

FLOORS = {
    "core": 0,
    "dist": 1,
    "tokens": 1,
    "kernels": 2,
    "data": 2,
    "nn": 3,
    "models": 4,
    "objectives": 5,
    "train": 6,
    "interop": 7,
    "plan": 7,
    "tokenize": 8,
    "generate": 9,
    "evaluate": 10,
}
TOP = 11  # modules that lie directly in mmgpt/, and configs/ under those that load it
LOADERS = ("cli", "presets", "__main__")
FILE_LINES, KERNEL_LINES = 400, 600
FUNCTION_LINES, LOOP_LINES = 60, 150

Rule = Callable[[str, str], list[str]]


# --- imports and floors


def owner(module: str) -> str:
    """`mmgpt.nn.layers` -> `nn`; a module directly in mmgpt/ -> its own name."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def floor(folder: str, is_module: bool) -> int | None:
    """The floor of a folder of mmgpt/, or of a module directly in it; None when it has none."""
    if folder in FLOORS:
        return FLOORS[folder]
    return TOP if is_module else None


def module_name(path: str) -> str:
    parts = PurePosixPath(path).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(("mmgpt", *parts) if parts[0] in ("configs", "launch") else parts)


def imports(path: str, text: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import of mmgpt, wherever it stands in the file."""
    package = module_name(path).split(".")
    if not path.endswith("__init__.py"):
        package = package[:-1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if a.name.split(".")[0] == "mmgpt")
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
            if base == "mmgpt":
                yield from ((node.lineno, f"mmgpt.{a.name}") for a in node.names)
            elif base.startswith("mmgpt."):
                yield node.lineno, base


def floors(path: str, text: str) -> list[str]:
    """A module imports only from its own folder and from lower floors."""
    name = module_name(path)
    mine = owner(name)
    if not mine or mine == "launch":
        return []
    here = TOP if mine == "configs" else floor(mine, PurePosixPath(path).parent.as_posix() == "mmgpt")
    if here is None:
        return [f"{path}: mmgpt/{mine}/ has no floor. Add it to FLOORS in tests/house.py and to the design."]
    faults = []
    for line, module in imports(path, text):
        theirs = owner(module)
        there = 0 if theirs.startswith("__") else FLOORS.get(theirs, TOP)  # __version__ is everybody's
        beside = here == there == TOP and not (mine == "configs" and theirs in LOADERS)
        if theirs == mine or there < here or beside:
            continue
        faults.append(
            f"{path}:{line}: {mine}/ (floor {here}) imports {module} (floor {there}). Move what is needed to a "
            f"floor below {here}, or hand it in as an argument from floor {there + (here == there)} or above."
        )
    return faults


# --- what is never called


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a name or attribute chain, "" for anything else."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


FORBIDDEN_MODULES = {
    "pickle": "reading a pickle runs its code. Store arrays as .npy, trees as JSON or through train/checkpoint.py.",
    "dill": "reading a pickle runs its code. Store arrays as .npy, trees as JSON.",
    "cloudpickle": "reading a pickle runs its code. Hand functions over by name.",
    "joblib": "it reads and writes pickles. Store arrays as .npy.",
    "shelve": "it reads and writes pickles. Store JSON.",
    "marshal": "it loads code. Store JSON.",
    "torch": "it is no dependency and its files are pickles. Read safetensors.",
}
FORBIDDEN_CALLS = {
    "eval": "it runs text as code. Parse what you expect.",
    "exec": "it runs text as code. Write the function.",
    "os.system": "it starts a shell. Use subprocess.run with a list.",
    "os.popen": "it starts a shell. Use subprocess.run with a list.",
    "yaml.load": "it builds any object. Use yaml.safe_load.",
    "yaml.unsafe_load": "it builds any object. Use yaml.safe_load.",
    "torch.load": "it reads a pickle. Read safetensors.",
    "shutil.unpack_archive": "member names may leave the folder. Read members by offset.",
}
PEERS = "mmgpt/evaluate/bench_"
"""Benchmarks that measure against a peer import it inside the command, if it is there."""
FORBIDDEN_METHODS = {"extractall": "member names may leave the folder. Read members by offset."}
FORBIDDEN_KEYWORDS = {
    ("shell", True): "it starts a shell. Pass the command as a list.",
    ("trust_remote_code", True): "it runs downloaded code. Implement the model here.",
    ("allow_pickle", True): "it reads a pickle. Store plain arrays.",
}
NNX_TRANSFORMS = ("jit", "grad", "value_and_grad", "scan", "vmap", "pmap", "remat", "cond", "while_loop", "Optimizer")


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported: `from a.b import c` gives `a.b.c`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((node.lineno, f"{node.module}.{a.name}") for a in node.names)


def forbidden(path: str, text: str) -> list[str]:
    """Nothing runs code that came as data."""
    tree = ast.parse(text)
    faults = []
    for line, name in imported(tree):
        if name.split(".")[0] == "torch" and path.startswith(PEERS):
            continue
        reason = FORBIDDEN_MODULES.get(name.split(".")[0]) or FORBIDDEN_CALLS.get(name)
        if reason:
            faults.append(f"{path}:{line}: imports {name}: {reason}")
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        reason = FORBIDDEN_CALLS.get(name)
        if reason is None and isinstance(node.func, ast.Attribute):
            reason = FORBIDDEN_METHODS.get(node.func.attr)
        if reason:
            faults.append(f"{path}:{node.lineno}: calls {name or ast.unparse(node.func)}: {reason}")
        for keyword in node.keywords:
            if isinstance(keyword.value, ast.Constant) and keyword.arg:
                reason = FORBIDDEN_KEYWORDS.get((keyword.arg, keyword.value.value))
                if reason and isinstance(keyword.value.value, bool):
                    faults.append(f"{path}:{node.lineno}: {keyword.arg}=True: {reason}")
    return faults


def mentions(path: str, text: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported or named in the code; comments and strings do not count."""
    tree = ast.parse(text)
    yield from imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Attribute, ast.Name)) and (name := dotted(node)):
            yield node.lineno, name


def transforms(path: str, text: str) -> list[str]:
    """flax.nnx is a container; the transforms are JAX's."""
    return [
        f"{path}:{line}: {name}: nnx transforms cost time per step and shard stacked moments wrongly. "
        "Split the module and use the one of jax or optax."
        for line, name in mentions(path, text)
        if re.search(rf"(^|\.)nnx\.({'|'.join(NNX_TRANSFORMS)})$", name)
    ]


def sharding(path: str, text: str) -> list[str]:
    """PartitionSpec is written in dist/ only; shard_map there, in kernels/, nn/attention.py and nn/param.py only."""
    faults = []
    for line, name in mentions(path, text):
        last = name.split(".")[-1]
        if last == "PartitionSpec" and not path.startswith("mmgpt/dist/"):
            faults.append(
                f"{path}:{line}: PartitionSpec outside dist/. Name logical axes and let dist/axes.py map them."
            )
        inside = path.startswith(("mmgpt/kernels/", "mmgpt/dist/")) or path in (
            "mmgpt/nn/attention.py",
            "mmgpt/nn/param.py",
        )
        if last == "shard_map" and not inside:
            faults.append(
                f"{path}:{line}: shard_map outside dist/, kernels/, nn/attention.py, nn/param.py. Use their verbs."
            )
    return faults


def config_defaults(path: str, text: str) -> list[str]:
    """A config has every field: no `config.get(...)`, no `getattr(config, ..., default)`."""
    faults = []

    def is_config(node: ast.expr) -> bool:
        name = dotted(node).split(".")[-1].lower()
        return name.endswith(("config", "cfg"))

    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Attribute) and node.func.attr == "get" and is_config(node.func.value):
            faults.append(f"{path}:{node.lineno}: {ast.unparse(node)}: a config is a dataclass. Read the field.")
        if dotted(node.func) == "getattr" and len(node.args) == 3 and is_config(node.args[0]):
            faults.append(f"{path}:{node.lineno}: {ast.unparse(node)}: a default hides a typo. Declare the field.")
    return faults


# --- names, sizes, docstrings


def file_names(path: str, text: str) -> list[str]:
    """Each file and folder is named for what it holds, and a new version replaces the old one."""
    bad = [
        p for p in PurePosixPath(path).with_suffix("").parts if re.fullmatch(r"utils?|helpers?|common|misc|.*_v\d+", p)
    ]
    return [f"{path}: {name!r} says nothing of what is inside. Name the thing it owns." for name in bad]


def sizes(path: str, text: str) -> list[str]:
    """Files and functions stay short enough to read at one sitting."""
    limit = KERNEL_LINES if path.startswith("mmgpt/kernels/") else FILE_LINES
    lines = len(text.splitlines())
    faults = [f"{path}: {lines} lines, at most {limit}. Split it by what it owns."] if lines > limit else []
    longest = LOOP_LINES if path == "mmgpt/train/loop.py" else FUNCTION_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > longest:
                faults.append(f"{path}:{node.lineno}: {node.name}() has {length} lines, at most {longest}. Split it.")
    return faults


def docstrings(path: str, text: str) -> list[str]:
    """A public module that holds code says in its first line what it is."""
    tree = ast.parse(text)
    if PurePosixPath(path).name.startswith("_") and not path.endswith("__init__.py"):
        return []
    if not tree.body or ast.get_docstring(tree):
        return []
    return [f"{path}: no docstring. Say in one line what the module owns."]


HOME = r"(?<![\w.])/(?:work|root|home/\w+|Users/\w+|tmp/\w+)(?=[/\s\"'`:;,)]|$)"
HOSTS = r"\b(?:pypi\.org|pythonhosted\.org|(?:index|extra-index|find-links)[-_]?(?:url)?\s*=\s*(?:https?|file):)"


def places(path: str, text: str) -> list[str]:
    """The repository is of no particular machine: no paths of one, no package index."""
    faults = []
    for number, line in enumerate(text.splitlines(), 1):
        if found := re.search(HOME, line):
            faults.append(f"{path}:{number}: {found.group()!r} is a path of one machine. Use a relative path.")
        if found := re.search(HOSTS, line):
            faults.append(f"{path}:{number}: {found.group()!r} names a package index. Leave that to the user's pip.")
    return faults
