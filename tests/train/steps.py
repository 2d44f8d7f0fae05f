"""Steps of a small run to save, load and compare, in this process and in others."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmgpt.train.checkpoint import Checkpoints, Restored

IMPORTS = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from mmgpt.dist import hosts
from mmgpt.train.checkpoint import Checkpoints
from tests.train.steps import abstract, holds, make_state, mesh, placed, same, values
"""


def make_state(step: int) -> dict[str, Any]:
    values = jnp.arange(24, dtype=jnp.float32).reshape(4, 6) + step
    return {
        "params": {"kernel": values, "scale": jnp.full((5,), step + 0.5, jnp.bfloat16)},
        "optimizer": {"mu": {"kernel": values / 3}, "count": jnp.int32(step), "1/odd.name": jnp.int32(-step)},
        "variables": {},
        "ema": {"kernel": values * 2},
        "flag": jnp.array(True),
    }


def abstract(state: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b))


def save_steps(folder: Path, *steps: int, **settings: Any) -> None:
    with Checkpoints.Config(**settings).build(folder) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), step * 8, {"config": f"hash {step}"})


def restore(folder: Path, **options: Any) -> Restored | None:
    with Checkpoints.Config().build(folder) as checkpoints:
        return checkpoints.restore(abstract(make_state(0)), **options)


def values(step: int) -> dict[str, Any]:
    """What a training state holds, in numpy: float32 and bfloat16, moments, a counter, odd numbers too."""
    rng = np.random.default_rng(step)
    kernel = rng.standard_normal((8, 16)).astype(np.float32)
    kernel[0, :3] = np.nan, -0.0, 1e-42
    return {
        "params": {"kernel": kernel, "scale": rng.standard_normal(8).astype(jnp.bfloat16)},
        "optimizer": {"mu": {"kernel": kernel / 3}, "nu": {"kernel": kernel**2}, "count": np.int32(step)},
        "step": np.int32(step),
        "flag": np.array(True),
    }


def mesh(*shape: int) -> jax.sharding.Mesh:
    """A mesh over the first devices of the run."""
    devices = jax.devices()[: shape[0] * shape[1]]
    explicit = (jax.sharding.AxisType.Explicit,) * 2
    return jax.make_mesh(shape, ("fsdp", "tensor"), axis_types=explicit, devices=devices)


def placed(state: dict[str, Any], over: jax.sharding.Mesh) -> dict[str, Any]:
    """The arrays over a mesh that may be of several processes: matrices over both axes, vectors over one."""
    specs = {2: jax.P("fsdp", "tensor"), 1: jax.P("tensor"), 0: jax.P()}

    def place(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, jax.NamedSharding(over, specs[x.ndim]), lambda at: x[at])

    return jax.tree.map(lambda x: place(np.asarray(x)), state)


def holds(state: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether every shard that this process holds has the expected dtype and bits."""

    def equal(x: jax.Array, y: np.ndarray) -> bool:
        parts = [(np.asarray(s.data), np.asarray(y)[s.index]) for s in x.addressable_shards]
        return bool(parts) and all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in parts)

    return jax.tree.structure(state) == jax.tree.structure(expected) and jax.tree.all(
        jax.tree.map(equal, state, expected)
    )


def run(code: str, *arguments: str) -> subprocess.Popen:
    """A Python process at the root of the repository that runs the code with these arguments."""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", IMPORTS + code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env=environment | {"JAX_PLATFORMS": "cpu"},
    )


def run_together(code: str, processes: int, *arguments: str) -> list[str]:
    """The same in several processes that are one run, with 8 devices together; what each of them said."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    join = f"jax.config.update('jax_num_cpu_devices', {8 // processes})\nindex = int(sys.argv.pop(1))\n"
    join += f"hosts.start('{address}', {processes}, index)\n" if processes > 1 else ""
    leave = "\nhosts.shutdown()\n" if processes > 1 else ""
    return [finish(p) for p in [run(join + code + leave, str(i), *arguments) for i in range(processes)]]


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, (process.returncode, err[-3000:])
    return out
