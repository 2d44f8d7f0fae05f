"""Steps of a small run to save, load and compare, in this process and in others."""

import os
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
from tests.train.steps import abstract, make_state, same
"""


def make_state(step: int) -> dict[str, Any]:
    values = jnp.arange(24, dtype=jnp.float32).reshape(4, 6) + step
    return {
        "params": {"kernel": values, "scale": jnp.full((5,), step + 0.5, jnp.bfloat16)},
        "optimizer": {"mu": {"kernel": values / 3}, "count": jnp.int32(step)},
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


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-3000:]
    return out
