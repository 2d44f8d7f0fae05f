"""Loads large tensors in a process of its own and prints the memory that it took besides them, in largest tensors."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mmgpt.core.config import ConfigError
from mmgpt.dist.mesh import Mesh
from mmgpt.interop import load
from mmgpt.interop.names import Entry
from mmgpt.interop.safetensors_folder import SafetensorsFolder

ROWS, WIDTH, LAYERS = 1 << 15, 1 << 10, 2


def entries() -> list[Entry]:
    """An embedding, a head that is turned round, and a stack of two layers."""
    shape = (ROWS, WIDTH)
    return [
        Entry(hf_name="embedding", hf_shape=shape, path="params/embedding"),
        Entry(hf_name="head", hf_shape=shape, path="params/head", order=(1, 0)),
        *(Entry(hf_name=f"layer.{i}", hf_shape=shape, path="params/layer", layer=i) for i in range(LAYERS)),
    ]


def resident(name: str) -> int:
    """Bytes of this process in memory: now (VmRSS) or at most (VmHWM). What rusage says is the parent's at a fork."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise ConfigError(f"no {name}")


def main(folder: Path, fsdp: int) -> None:
    mesh = Mesh.Config(fsdp=fsdp).build(jax.devices()[:fsdp])
    spec = jax.sharding.PartitionSpec("fsdp") if fsdp > 1 else jax.sharding.PartitionSpec()
    layers = jax.sharding.PartitionSpec(None, *spec)

    def leaf(shape: tuple[int, ...], spec: jax.sharding.PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.sharding.NamedSharding(mesh, spec))

    abstract = {
        "params": {
            "embedding": leaf((ROWS, WIDTH), spec),
            "head": leaf((WIDTH, ROWS), spec),
            "layer": leaf((LAYERS, ROWS, WIDTH), layers),
        }
    }
    # The allocator keeps a few blocks of each thread, beside whatever tensor: they are to stay small beside this one.
    load.BLOCK = 2 << 20
    jax.block_until_ready(jnp.ones(8) + 1)  # what a first computation takes is not the load's
    source, before = SafetensorsFolder(folder), resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the most so far is forgotten
    found = load.load(entries(), source, abstract)["params"]
    jax.block_until_ready(found)
    peak = resident("VmHWM")
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(found))
    for name, row in (("embedding", 5), ("head", 7), ("layer", 1)):
        there = source.read({"layer": "layer.1"}.get(name, name))
        wanted = there.T[row] if name == "head" else there if name == "layer" else there[row]
        np.testing.assert_array_equal(np.asarray(found[name])[row], np.asarray(wanted, np.float32))
    largest = ROWS * WIDTH * 4
    sys.stdout.write(f"{(peak - before - held) / largest:.3f}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
