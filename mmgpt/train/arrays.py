"""Arrays of a step in a folder that all processes see: by Orbax, each process its part, for any mesh to load.

This is the only file that knows Orbax, which casts dtypes in silence and does not notice flipped bits: what it is given
to load is verified and compared before.
"""

import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import tensorstore
from orbax.checkpoint import v1 as ocp

from mmgpt.core.config import ConfigError
from mmgpt.train import manifest

State = dict[str, Any]
FILE_BYTES = 256 * 2**20
"""Arrays are cut into files of about this size, so that several threads can hash them."""

# Orbax logs the traceback of each of its threads; the error itself reaches us and is told in a line.
logging.getLogger("absl").addFilter(lambda record: "_SignalingThread.run() raised" not in record.getMessage())


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


def load(folder: Path, wanted: State, partial: bool) -> State:
    """The arrays with the shapes, dtypes and shardings asked for; any exception of Orbax where it cannot load them.

    ValueError before anything is read where the files hold other arrays.
    """
    with _context(partial):
        _check(folder, wanted)
        return ocp.load(str(folder), wanted)  # pyright: ignore[reportReturnType]


def _check(folder: Path, wanted: State) -> None:
    """Hashes only tell that nothing changed since: who wrote them may have written sizes that no memory holds."""
    index = folder / "state" / "_METADATA"
    if index.stat().st_size > manifest.MOST_BYTES:
        raise ValueError(f"{index.name} is larger than {manifest.MOST_BYTES} bytes, as none is")
    place = {"driver": "file", "path": f"{folder}/state/"}
    stored: Any = tensorstore.KvStore.open({"driver": "ocdbt", "base": place}).result()
    # Not by Orbax, whose readers of the other arrays go on when one is not as it should be.
    leaves = manifest.named(wanted, ".")
    reads = {name: stored.read(f"{name}/zarr.json") for name in leaves}
    for name, read in reads.items():
        try:
            fits = _fits(json.loads(read.result().value), manifest.kind(leaves[name]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            fits = False
        if not fits:
            raise ValueError(f"{name} is another array there than the manifest says, or not there")


def _fits(stored: dict[str, Any], said: str) -> bool:
    """Whether an array is of this kind, and in pieces that are no larger than it and need no unpacking."""
    pieces = [stored["chunk_grid"]["configuration"]["chunk_shape"]]
    for codec in stored["codecs"]:
        if codec["name"] == "sharding_indexed":
            pieces.append(codec["configuration"]["chunk_shape"])
            codecs = codec["configuration"]["codecs"] + codec["configuration"]["index_codecs"]
        else:
            codecs = [codec]
        if any(codec["name"] not in ("bytes", "crc32c") for codec in codecs):
            return False
    size = math.prod(stored["shape"])
    kind = f"{stored['data_type']}[{','.join(map(str, stored['shape']))}]"
    return kind == said and all(math.prod(piece) <= size for piece in pieces)


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
