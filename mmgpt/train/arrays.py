"""Arrays of a step in a folder that all processes see: by Orbax, each process its part, for any mesh to load.

This is the only file that knows Orbax, which casts dtypes in silence and does not notice flipped bits: what it is given
to load is verified and compared before.
"""

import logging
import math
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from orbax.checkpoint import v1 as ocp

from mmgpt.core.config import ConfigError
from mmgpt.train import manifest

State = dict[str, Any]
FILE_BYTES = 256 * 2**20
"""Arrays are cut into files of about this size, so that several threads can hash them."""

# Orbax logs the traceback of each of its threads, and what it cannot read; the error itself is told in a line.
TOLD = re.compile(r"_SignalingThread\.run\(\) raised|^Failed to get metadata")
logging.getLogger("absl").addFilter(lambda record: TOLD.search(record.getMessage()) is None)


def check_path(directory: Path) -> None:
    """ConfigError where Orbax would take the path for a pattern: it then writes no arrays, and says nothing."""
    if found := sorted(set("*?[") & set(str(directory.absolute()))):
        raise ConfigError(
            f"{directory}: no checkpoint can be written under a path with {' or '.join(found)}; give another folder."
        )


def start(folder: Path, state: State) -> Callable[[], dict[str, Any]]:
    """Copies the arrays to the host, after which they may be donated; what is returned waits until they are written.

    Every process calls both. OSError where the system refuses something.
    """
    with _context():
        response = ocp.save_async(str(folder), state)

    def finish() -> dict[str, Any]:
        try:
            response.result()
        except Exception as e:
            raise _as_the_system_says(e) from e
        return {}

    return finish


def load(folder: Path, tree: dict[str, str], wanted: State, partial: bool) -> State:
    """The arrays with the shapes, dtypes and shardings asked for; any exception of Orbax where it cannot load them.

    ValueError before anything is read where the files hold other arrays than `tree`, which is the manifest's.
    """
    with _context(partial):
        _check(folder, tree)
        return ocp.load(str(folder), wanted)  # pyright: ignore[reportReturnType]


def _check(folder: Path, tree: dict[str, str]) -> None:
    """Hashes only tell that nothing changed since: who wrote them may have written sizes that no memory holds."""
    index = folder / "state" / "_METADATA"
    if index.stat().st_size > manifest.MOST_BYTES:
        raise ValueError(f"{index.name} is larger than {manifest.MOST_BYTES} bytes, as none is")
    found = manifest.named(ocp.metadata(str(folder)).metadata)
    if wrong := sorted(
        name for name in found.keys() | tree.keys() if name not in tree or not _is(found.get(name), tree[name])
    ):
        raise ValueError(f"{wrong[0]} is another array there than the manifest says, or not there")


def _is(leaf: Any, said: str) -> bool:
    """Whether the stored array is as said, in pieces that are no larger than it."""
    if leaf is None or manifest.kind(leaf) != said:
        return False
    return math.prod(leaf.storage_metadata.chunk_shape) <= math.prod(leaf.shape)


def written_by(process: int, names: Iterable[str]) -> list[str]:
    """The files of a step that this process has written, and has in its cache."""
    return [name for name in names if name.startswith(f"state/ocdbt.process_{process}/")]


def _as_the_system_says(error: Exception) -> Exception:
    """The OSError that Orbax met, which it tells as text."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return error if code is None else OSError(int(code[1]), os.strerror(int(code[1])))


def _context(partial: bool = False) -> ocp.Context:
    context = ocp.Context()
    # Weights hardly compress (the low bits are noise), and shardings are always given at load.
    context.array.saving.use_compression = False
    context.array.saving.enable_write_sharding_file = False
    context.array.saving.array_metadata_store = None
    context.array.saving.ocdbt_target_data_file_size = FILE_BYTES
    context.pytree.loading.partial_load = partial
    return context
