"""Faults of checkpoints: `python -m tests.soak.checkpoints --flips 500`; the ordinary tests do a few of each.

Whatever is flipped, cut off or missing in a step is found, the step is set aside, and the one before it loads bit for
bit. A folder that was made to harm is refused with one error before memory is taken.
"""

import argparse
import json
import os
import random
import resource
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from mmgpt.core.log import progress, show, table
from mmgpt.train import manifest
from mmgpt.train.checkpoint import CheckpointError, Checkpoints
from tests.train.steps import abstract, same

MEGABYTE = 2**20


def state(step: int) -> dict[str, Any]:
    """Arrays large enough to lie in files of their own, and some that Orbax puts into its index."""
    rng = np.random.default_rng(step)
    kernel = rng.standard_normal((64, 64)).astype(np.float32)
    made = {
        "params": {"kernel": kernel, "scale": rng.standard_normal(2048).astype(jax.numpy.bfloat16)},
        "optimizer": {"mu": {"kernel": kernel / 3}, "count": np.int32(step)},
    }
    return jax.tree.map(jax.device_put, made)


class World:
    """A run with step 1 in the shared folder and step 2, which is harmed, there or in the local one."""

    def __init__(self, folder: Path, local: bool) -> None:
        self._folder = folder
        self._settings = Checkpoints.Config(local=str(folder / "ram") if local else "", local_every=2)
        with self._open() as checkpoints:
            checkpoints.save(1, state(1), 8, {})
            (checkpoints.save_local if local else checkpoints.save)(2, state(2), 16, {})
        (self.step,) = (found.parent for found in folder.glob(f"**/2/{manifest.NAME}"))

    def _open(self) -> Checkpoints:
        return self._settings.build(self._folder / "run" / "checkpoints")

    def files(self) -> list[Path]:
        return sorted(path for path in self.step.rglob("*") if path.is_file())

    def newest(self) -> int:
        """The step that a restart goes on from, whose arrays must be the ones that were saved."""
        with self._open() as checkpoints:
            found = checkpoints.restore(abstract(state(0)))
        assert found is not None and same(found.state, state(found.step)) and found.position == 8 * found.step
        return found.step

    def is_found(self) -> bool:
        """Whether a restart sets step 2 aside and takes step 1, and the next one does so too; makes it good again."""
        aside = self.step.with_name("2.corrupt-1")
        found = self.newest() == 1 and aside.exists() and self.newest() == 1
        if aside.exists():
            aside.rename(self.step)
        return found


def flips(world: World, count: int, seed: int) -> Iterator[str]:
    """Flips one random bit at a time, in each file in turn; yields what went unnoticed, or ""."""
    draw = random.Random(seed)
    files = [path for path in world.files() if path.stat().st_size]
    for number in range(count):
        path = files[number % len(files)]
        before = path.read_bytes()
        place, bit = draw.randrange(len(before)), draw.randrange(8)
        path.write_bytes(before[:place] + bytes([before[place] ^ 1 << bit]) + before[place + 1 :])
        yield "" if world.is_found() else f"{path.name}: bit {bit} of byte {place} of {len(before)}"
        path.write_bytes(before)


def cuts(world: World) -> Iterator[str]:
    """Each file gone, emptied, and cut to 50 % and 99 %."""
    for path in world.files():
        before = path.read_bytes()
        sizes = {0, len(before) // 2, len(before) * 99 // 100} - {len(before)}
        for size in (None, *sorted(sizes)):
            path.unlink()
            if size is not None:
                path.write_bytes(before[:size])
            yield "" if world.is_found() else f"{path.name}: {size} of {len(before)} bytes"
            path.write_bytes(before)


# --- folders made to harm, with hashes that are right


def seal_again(step: Path, changes: dict[str, Any] | None = None) -> None:
    """Gives a step a manifest with other values and the right hashes."""
    manifest.seal(step, manifest.read(step) | (changes or {}), manifest.hashes(step, manifest.files(step)))


def _stored(step: Path) -> Any:
    return ts.KvStore.open({"driver": "ocdbt", "base": f"file://{step}/state/"}).result()


def _array(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Changes what the folder says of one array."""

    def harm(step: Path) -> None:
        stored = _stored(step)
        said = json.loads(stored.read(b"params.kernel/zarr.json").result().value)
        change(said)
        stored.write(b"params.kernel/zarr.json", json.dumps(said).encode()).result()

    return harm


def _bomb(step: Path) -> None:
    """A compressed piece of 1 GB of zeros for an array of 16 kB."""
    side = 2**14
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "gzip"}]
    pieces = {"name": "regular", "configuration": {"chunk_shape": [side, side]}}
    array = {"shape": [64, 64], "chunk_grid": pieces, "data_type": "float32", "codecs": codecs}
    place = {"driver": "ocdbt", "base": f"file://{step}/state/", "path": "params.kernel/"}
    ts.open({"driver": "zarr3", "kvstore": place, "metadata": array}, create=True, delete_existing=True).result()
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    data = b"".join(packer.compress(bytes(4 * side)) for _ in range(side)) + packer.flush()
    _stored(step).write(b"params.kernel/c/0/0", data).result()


def _grid(said: dict[str, Any]) -> dict[str, Any]:
    return said["chunk_grid"]["configuration"]


def _file(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda step: (step / name).write_bytes(data)


def _pipe(step: Path) -> None:
    """A name that is read for ever, under a manifest that knows it."""
    (step / "commit_success.txt").unlink()
    os.mkfifo(step / "commit_success.txt")
    body = manifest.read(step)
    manifest.seal(step, body | {"position": 9}, body["files"])


def _tree(**changes: Any) -> Callable[[Path], object]:
    return lambda step: seal_again(step, {"tree": manifest.read(step)["tree"] | changes})


ANOTHER = "another array there than the manifest says"
HARMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "an array of 4 EiB": (_array(lambda said: said.update(shape=[2**30, 2**30])), ANOTHER),
    "pieces of 4 TiB": (_array(lambda said: _grid(said).update(chunk_shape=[2**20, 2**20])), ANOTHER),
    "a compressed piece of 1 GB": (_bomb, ANOTHER),
    "an array of another dtype": (_array(lambda said: said.update(data_type="int8")), ANOTHER),
    "an array of no dtype": (_array(lambda said: said.update(data_type="object")), ANOTHER),
    "an array that is a list": (_array(lambda said: said.update(codecs=[[]])), ANOTHER),
    "noise for a tree": (_file("state/manifest.ocdbt", random.Random(0).randbytes(4096)), ANOTHER),
    "an empty index": (_file("state/_METADATA", b""), "cannot be loaded"),
    "an index of 17 MB": (_file("state/_METADATA", b" " * 17 * MEGABYTE), "_METADATA is larger than"),
    "an index of lists in lists": (_file("state/_METADATA", b"[" * MEGABYTE), "recursion depth"),
    "an index without arrays": (
        _file("state/_METADATA", b'{"tree_metadata": {}, "use_zarr3": true}'),
        "cannot be loaded",
    ),
    "a leaf of another type": (
        _tree(**{"params/kernel": "object[64,64]"}),
        "saved object[64,64], this run has float32[64,64]",
    ),
    "a leaf of 4 EiB": (
        _tree(**{"params/kernel": "float32[1073741824,1073741824]"}),
        "saved float32[1073741824,1073741824]",
    ),
    "a leaf that is a number": (_tree(**{"params/kernel": 3}), "saved 3, this run has float32[64,64]"),
    "a step that is a text": (lambda step: seal_again(step, {"step": "2"}), "set aside: ['1.corrupt-1']"),
    "a manifest of 17 MB": (_file(manifest.NAME, b" " * 17 * MEGABYTE), "set aside: ['1.corrupt-1']"),
    "a manifest of lists in lists": (_file(manifest.NAME, b"[" * MEGABYTE), "set aside: ['1.corrupt-1']"),
    "a pipe for a file": (_pipe, "set aside: ['1.corrupt-1']"),
}
"""What is done to a step, and what is told of it. It is sealed again then, unless its manifest was what changed."""


def refused(folder: Path, name: str) -> str:
    """Harms a step in a new run and loads it; what the error said. CheckpointError must be it."""
    with Checkpoints.Config().build(folder) as checkpoints:
        checkpoints.save(1, state(1), 8, {})
        checkpoints.wait()
        sealed = (folder / "1" / manifest.NAME).read_bytes()
        harm, told = HARMS[name]
        harm(folder / "1")
        if (folder / "1" / manifest.NAME).read_bytes() == sealed:
            seal_again(folder / "1")
        try:
            checkpoints.restore(abstract(state(0)))
        except CheckpointError as e:
            assert told in str(e), f"{name}: {e}"
            return str(e)
    raise AssertionError(f"{name}: loaded")


def peak() -> int:
    """The most memory that this process ever had, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    missed: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for where in ("shared", "local"):
            world = World(Path(folder) / where, where == "local")
            faults = {"flipped bits": flips(world, asked.flips, asked.seed), "files gone or cut": cuts(world)}
            for name, found in faults.items():
                said = list(progress(found, label=f"{where}: {name}"))
                missed += filter(None, said)
                rows[f"{name}, {where}"] = {"faults": len(said), "found": said.count("")}
            assert world.newest() == 2
        harms = {}
        before = peak()
        for number, name in enumerate(HARMS):
            harms[name] = refused(Path(folder) / f"harm {number}", name)
        rows["folders made to harm"] = {"faults": len(harms), "found": len(harms), "megabytes": peak() - before}
    show(table("checkpoints", rows))
    for line in missed:
        sys.stdout.write(f"missed: {line}\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
