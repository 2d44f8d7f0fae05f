"""Remat policies: what each keeps for the backward pass, with the same gradients whatever is recomputed."""

import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmgpt.dist.mesh import Mesh
from mmgpt.kernels.attention import api
from mmgpt.nn.stack import Remat
from mmgpt.objectives.next_token import NextToken
from mmgpt.objectives.objective import total
from mmgpt.train.state import Structure
from mmgpt.train.step import place
from tests import tiny

POLICIES: tuple[Remat, ...] = typing.get_args(Remat)


def differentiated(remat: Remat, dtype: str = "float32") -> tuple[Any, Any, Any]:
    """The function of the parameters, the parameters, and a batch."""
    model = tiny.decoder(layers=3, scan=True, remat=remat, qk_norm="rms", dtype=dtype)
    structure = Structure(model.build, seed=0)
    objective = NextToken.Config().fit(tiny.grammar().vocabulary).build()
    params = tiny.drawn(structure.abstract()[0])
    batch = place(tiny.batch(2, 64))

    def value(params: Any) -> jax.Array:
        return total(objective.loss(structure.merge(params, {}), batch, None), objective.coefficients)

    return value, params, batch


@pytest.mark.parametrize("remat", [remat for remat in POLICIES if remat != "none"])
def test_gradients_are_those_of_keeping_everything(remat: Remat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "DENSE_PAIRS", 0)  # the kernel over blocks keeps what it has named
    with jax.set_mesh(Mesh.Config().build(jax.devices()[:1])):
        found = []
        for policy in ("none", remat):
            value, params, _ = differentiated(policy)
            found.append(jax.jit(jax.grad(value))(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), *found)


def test_each_policy_keeps_less_than_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer's forward pass hands to its backward pass: the arrays that the loop over layers stacks up."""
    monkeypatch.setattr(api, "DENSE_PAIRS", 0)
    kept = []
    with jax.set_mesh(Mesh.Config().build(jax.devices()[:1])):
        for remat in ("none", "matmuls", "projections", "attention", "full"):
            value, params, _ = differentiated(remat)
            _, pull = jax.vjp(value, params)
            stacked = [x for x in jax.tree.leaves(pull) if hasattr(x, "shape") and x.shape[:1] == (3,) and x.ndim > 2]
            kept.append(sum(x.size for x in stacked if x.dtype == jnp.float32))
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == len(kept), kept
