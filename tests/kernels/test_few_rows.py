"""Summed products of few rows are the feed-forward layer's, also where devices hold a part of it each."""

import jax
import numpy as np
import pytest
from flax import nnx

from mmgpt.dist.mesh import Mesh
from mmgpt.kernels import few_rows
from mmgpt.nn.layers import GatedMLP, SummedMLP
from mmgpt.nn.param import act


@pytest.mark.parametrize(("fsdp", "tensor"), [(1, 1), (1, 4), (3, 2)])
def test_it_is_the_same_layer(fsdp: int, tensor: int) -> None:
    mesh = Mesh.Config(fsdp=fsdp, tensor=tensor).build(jax.devices()[: fsdp * tensor])
    with jax.set_mesh(mesh):
        mlp = GatedMLP(nnx.Rngs(0), 24, 40, 1.0)
        x_BTD = act(jax.random.normal(jax.random.key(1), (3, 2, 24)), "batch seq embed")
        found = jax.jit(lambda x: SummedMLP(mlp)(x))(x_BTD)
        wanted = jax.jit(lambda x: mlp(x))(x_BTD)
    x, gate, up, down = (np.asarray(a, np.float64) for a in (x_BTD, mlp.gate[...], mlp.up[...], mlp.down[...]))
    exact = (x @ gate / (1 + np.exp(-x @ gate)) * (x @ up)) @ down
    assert np.abs(found - exact).max() < 1e-5 and np.abs(found - wanted).max() < 1e-5


def test_it_is_taken_for_few_rows_alone() -> None:
    fused = few_rows._fused()
    assert [few_rows.pays(rows) for rows in (2, 7, 8, 16, 17)] == [False, False, fused, fused, False]
