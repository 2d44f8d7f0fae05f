"""The same losses whatever the mesh and the number of microbatches: 20 steps of one run on fake devices."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

from mmgpt.core.config import ConfigError
from mmgpt.dist.mesh import Mesh
from mmgpt.kernels.attention import api
from mmgpt.objectives.next_token import NextToken
from mmgpt.train.optimizer import Adafactor, Muon, Optimizer
from mmgpt.train.state import Structure
from mmgpt.train.step import make_step, place
from tests import tiny

STEPS = 20
WAYS: dict[str, tuple[Mesh.Config, dict[str, Any]]] = {
    "fsdp=8": (Mesh.Config(fsdp=8), {}),
    "fsdp=2, context=2, tensor=2": (Mesh.Config(fsdp=2, context=2, tensor=2), {}),
    "fsdp=2, tensor=4": (Mesh.Config(fsdp=2, tensor=4), {}),
    "replica=2, fsdp=4": (Mesh.Config(replica=2, fsdp=4), {}),
    "replica=8": (Mesh.Config(replica=8, fsdp=1), {}),
    "fsdp=2, context=4, ring": (Mesh.Config(fsdp=2, context=4), {"context": "ring"}),
    "one, 4 microbatches": (Mesh.Config(), {"microbatches": 4}),
    "replica=2, fsdp=2, tensor=2, 2 microbatches": (Mesh.Config(replica=2, fsdp=2, tensor=2), {"microbatches": 2}),
    "fsdp=8, scanned, matmuls kept": (Mesh.Config(fsdp=8), {"scan": True, "remat": "matmuls"}),
    "fsdp=4, context=2, scanned, recomputed": (Mesh.Config(fsdp=4, context=2), {"scan": True, "remat": "full"}),
}


def losses(mesh: Mesh.Config, optimizer: Optimizer.Config, *, microbatches: int = 1, **changes: Any) -> list[float]:
    count = 1 if mesh == Mesh.Config() else 8
    with jax.set_mesh(mesh.build(jax.devices()[:count])):
        model = tiny.decoder(kv_heads=4, qk_norm="rms", **changes)
        structure = Structure(model.build, seed=0)
        built = optimizer.build(STEPS)
        objective = NextToken.Config().fit(tiny.grammar().vocabulary).build()
        step = make_step(structure, objective, built, seed=0, ema=None, microbatches=microbatches)
        state, found = tiny.state(structure, built), []
        for i in range(STEPS):
            state, values = step(state, place(tiny.batch(8, 64, seed=i)))
            found.append(float(values["loss"]))
    return found


ADAM = Optimizer.Config(learning_rate=3e-3, warmup=2)
LEAN = Adafactor(learning_rate=3e-3, warmup=2, b1=0.9, smallest=8)


@functools.cache
def alone(optimizer: Optimizer.Config) -> list[float]:
    return losses(Mesh.Config(), optimizer)


QUICK = ("fsdp=2, context=2, tensor=2", "replica=2, fsdp=2, tensor=2, 2 microbatches", "fsdp=8, scanned, matmuls kept")
"""The others are slow."""


@pytest.mark.parametrize("optimizer", [ADAM, LEAN], ids=["adam", "adafactor"])
@pytest.mark.parametrize("way", [way if way in QUICK else pytest.param(way, marks=pytest.mark.slow) for way in WAYS])
def test_the_losses_are_those_of_one_device(
    way: str, optimizer: Optimizer.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "DENSE_PAIRS", 0)  # short rows too go over blocks, which a ring needs
    mesh, options = WAYS[way]
    one = alone(optimizer)
    np.testing.assert_allclose(losses(mesh, optimizer, **options), one, rtol=0, atol=1e-5)
    assert one[-1] < one[0] - 0.2


def test_muon_takes_the_same_steps_with_microbatches() -> None:
    muon = Muon(learning_rate=3e-3, warmup=2)
    one, parts = (losses(Mesh.Config(), muon, microbatches=count) for count in (1, 2))
    np.testing.assert_allclose(parts, one, rtol=0, atol=1e-4)  # Newton-Schulz runs in bfloat16


def test_rows_that_do_not_divide_into_microbatches_are_told() -> None:
    with pytest.raises(
        ConfigError, match=r"batch_rows 8 does not divide into microbatches=3 on 1 devices.*multiple of 3"
    ):
        losses(Mesh.Config(), ADAM, microbatches=3)
