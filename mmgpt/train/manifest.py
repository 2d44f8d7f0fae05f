"""The manifest of a checkpoint folder: a JSON file with the sha256 of every other file, and of itself.

Whatever bit of the folder changes, is cut off or goes away afterwards, `read` or `verify` raises Damage.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from mmgpt.core.log import write_atomic

NAME = "manifest.json"
HASH_THREADS = 8
MOST_BYTES = 16 * 2**20
"""Of a manifest: one of 5 TB in 20 000 files and 10 000 arrays has 4 MB."""
PARTS = {"step": int, "position": int, "meta": dict, "tree": dict, "files": dict}


class Damage(Exception):
    """What is wrong with the files of a folder, as the end of a sentence."""


def seal(folder: Path, body: dict[str, Any], files: dict[str, str]) -> None:
    """Writes the manifest: `body` (plain JSON with all PARTS) and the hashes of the files. Raises OSError."""
    write_atomic(folder / NAME, render(body | {"files": files}))


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, itself verified; raises Damage."""
    try:
        with open(folder / NAME, "rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise Damage(f"{NAME} is larger than {MOST_BYTES} bytes, as none is")
        body = json.loads(data)
        body.pop("sha256")
        intact = render(body) == data
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise Damage(f"{NAME} cannot be read ({type(e).__name__})") from e
    if not intact:
        raise Damage(f"{NAME} has changed")
    if any(type(body.get(name)) is not kind for name, kind in PARTS.items()):
        raise Damage(f"{NAME} is not of a step: it needs {', '.join(PARTS)}")
    return body


def verify(folder: Path, body: dict[str, Any], share: int = 0, shares: int = 1) -> None:
    """Hashes this share of the folder's files; raises Damage that names the first that is gone or has changed."""
    expected: dict[str, str] = body["files"]
    if missing := sorted(expected.keys() - files(folder)):
        raise Damage(f"{missing[0]} is gone")
    for name, found in hashes(folder, sorted(expected)[share::shares]).items():
        if found != expected[name]:
            raise Damage(f"{name} has changed")


def render(body: dict[str, Any]) -> bytes:
    """JSON that ends with the hash of what stands before it; raises ValueError or TypeError if `body` is not JSON."""
    text = json.dumps(body, indent=1, sort_keys=True, allow_nan=False).removesuffix("\n}")
    return f'{text},\n "sha256": "{hashlib.sha256(text.encode()).hexdigest()}"\n}}\n'.encode()


def named(state: dict[str, Any], separator: str = "/") -> dict[str, Any]:
    """Path, as in "params/layer/kernel", -> leaf."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path, simple=True, separator=separator): leaf for path, leaf in leaves}


def tree(state: dict[str, Any]) -> dict[str, str]:
    """Path -> "dtype[shape]" of every leaf; ValueError names a leaf that cannot be saved."""
    found = {}
    for name, leaf in named(state).items():
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise ValueError(f"state {name}: expected an array, found {type(leaf).__name__}; make it a jax.Array.")
        if 0 in leaf.shape:
            raise ValueError(f"state {name}: shape {leaf.shape} has no elements and cannot be saved; leave it out.")
        found[name] = kind(leaf)
    return found


def kind(leaf: Any) -> str:
    """As in "float32[64,128]"."""
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def files(folder: Path) -> set[str]:
    """The names of all files in a folder but the manifest's."""
    # os.walk passes over folders that are deleted meanwhile; what is no plain file could be read for ever.
    found = (os.path.join(place, name) for place, _, names in os.walk(folder) for name in names)
    return {os.path.relpath(path, folder) for path in found if os.path.isfile(path)} - {NAME}


def hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The sha256 of each file, several at a time; raises Damage where the disk cannot read one."""

    def one(name: str) -> str:
        try:
            with open(folder / name, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as e:
            # What the disk cannot read is damage. A missing permission is not, and is raised as it is.
            if e.errno not in (errno.EIO, errno.ENOENT, errno.ENODATA, errno.ESTALE):
                raise
            raise Damage(f"{name} cannot be read ({os.strerror(e.errno)})") from e

    names = list(names)
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))
