"""A step done twice from the same state: a device that computes wrongly in silence gives other bits the second time."""

import functools
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmgpt.core.errors import UserError
from mmgpt.core.log import console
from mmgpt.core.stream import Batch
from mmgpt.dist import hosts
from mmgpt.dist.agreement import agree
from mmgpt.dist.mesh import platform
from mmgpt.train.manifest import named
from mmgpt.train.state import State
from mmgpt.train.step import StepMetrics

NAME = "corruption.jsonl"
"""File in the run folder with a line for each step that did not come out the same twice."""
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"

Step = Callable[[State, Batch], tuple[State, StepMetrics]]
Sums = dict[tuple[str, str], int]
"""(device, array) -> the sum of the bits that the device holds of the array."""


class Corruption(UserError, RuntimeError):
    """A step that gave other bits the second time; what it left must not be saved."""


def possible() -> bool:
    """Whether the same program gives the same bits here: GPUs add up in any order unless XLA is told not to."""
    if platform() != "gpu" or DETERMINISTIC in os.environ.get("XLA_FLAGS", ""):
        return True
    console.print(f"no step is replayed: a GPU repeats its bits only with XLA_FLAGS={DETERMINISTIC}")
    return False


def twice(step: Step, state: State, batch: Batch, number: int, run_dir: Path) -> tuple[State, StepMetrics]:
    """`step(state, batch)`, done twice by the same program and compared bit for bit; every process calls it.

    The state waits in the hosts' memory meanwhile, so that the devices need no room for a second one. Raises Corruption
    on every process where the bits differ on any, after it was recorded in the run folder.
    """
    kept, before = _to_host(state), _sums(state)
    once = _sums(step(state, batch)[0])
    state = _to_device(kept)
    moved = _differ(before, _sums(state))
    state, values = step(state, batch)
    found = moved or _differ(once, _sums(state))
    said = agree("replay", [socket.gethostname(), *found] if found else [], lambda said: [x for x in said if x])
    if said:
        raise Corruption(_told(number, said, run_dir))
    return state, values


def _told(number: int, said: list[list[str]], run_dir: Path) -> str:
    """Records what was found and says it."""
    where = "; ".join(f"{host}: {', '.join(found)}" for host, *found in said)
    if hosts.is_lead():
        record = {"step": number, "time": round(time.time(), 3), "found": {host: found for host, *found in said}}
        with open(run_dir / NAME, "a") as file:
            file.write(json.dumps(record) + "\n")
    return (
        f"step {number} gave other bits when it was done again from the same state and batch ({where}). A device or "
        "its memory fails in silence. Nothing of it was saved: run the same command on other machines, and it goes on "
        f"from the checkpoint before; {run_dir / NAME} keeps the record."
    )


def _differ(first: Sums, second: Sums) -> list[str]:
    """The devices that hold other bits, each with how many of its arrays."""
    counts: dict[str, int] = {}
    for device, _ in (place for place in first if first[place] != second[place]):
        counts[device] = counts.get(device, 0) + 1
    arrays = len({array for _, array in first})
    return [f"{device} in {count} of {arrays} arrays" for device, count in sorted(counts.items())]


def _sums(state: State) -> Sums:
    """What each device of this process holds, in one number for each array."""
    held: dict[Any, dict[str, jax.Array]] = {}
    for name, leaf in named(state).items():
        for shard in leaf.addressable_shards:
            # Of a single device it is the whole array, which still names the mesh; no bytes are moved here.
            alone = jax.device_put(shard.data, jax.sharding.SingleDeviceSharding(shard.device))
            held.setdefault(shard.device, {})[name] = alone
    made = {}
    for device, arrays in held.items():
        with jax.set_mesh(_alone(device)):
            made[device] = _bits(arrays)
    return {(str(device), name): int(n) for device, sums in made.items() for name, n in jax.device_get(sums).items()}


@functools.cache
def _alone(device: Any) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array([device]), ("alone",))


@jax.jit
def _bits(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Bits as numbers, each times an odd number of its own, modulo 2^32: no single flip and no exchange goes unseen."""

    def summed(array: jax.Array) -> jax.Array:
        flat = jnp.ravel(array)
        if flat.dtype == jnp.bool_:
            flat = flat.astype(jnp.uint8)
        words = jax.lax.bitcast_convert_type(flat, jnp.dtype(f"uint{8 * flat.dtype.itemsize}"))
        odd = 2 * jnp.arange(words.size, dtype=jnp.uint32) + 1
        return jnp.sum(words.astype(jnp.uint32) * odd, dtype=jnp.uint32)

    return jax.tree.map(summed, arrays)


def _to_host(state: State) -> Any:
    """Copies of this process's shards, with what it takes to put them back."""

    def copied(leaf: jax.Array) -> tuple[Any, Any, list[tuple[Any, np.ndarray]]]:
        # Copies of their own: where the CPU is the device, others would be views of what is donated.
        return leaf.shape, leaf.sharding, [(s.device, np.array(s.data, copy=True)) for s in leaf.addressable_shards]

    for leaf in jax.tree.leaves(state):
        leaf.copy_to_host_async()
    return jax.tree.map(copied, state)


def _to_device(kept: Any) -> State:
    def back(found: tuple[Any, Any, list[tuple[Any, np.ndarray]]]) -> jax.Array:
        shape, sharding, shards = found
        arrays = [jax.device_put(data, device) for device, data in shards]
        return jax.make_array_from_single_device_arrays(shape, sharding, arrays)

    return jax.tree.map(back, kept, is_leaf=lambda x: isinstance(x, tuple))
