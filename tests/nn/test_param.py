"""The sharded product beside plain `jnp.einsum`: value and both gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmgpt.dist import axes as rules
from mmgpt.dist.mesh import Mesh
from mmgpt.nn.param import Param, einsum


@pytest.mark.parametrize(
    ("equation", "x_shape", "w_shape", "axes"),
    [
        ("btd,df->btf", (4, 6, 8), (8, 12), "batch seq mlp"),
        ("btf,fd->btd", (4, 6, 12), (12, 8), "batch seq embed"),
        ("btd,vd->btv", (4, 6, 8), (10, 8), "batch seq vocab"),
    ],
)
@pytest.mark.parametrize("devices", [2, 4])
def test_value_and_gradients_are_those_of_einsum(
    equation: str, x_shape: tuple[int, ...], w_shape: tuple[int, ...], axes: str, devices: int
) -> None:
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in (x_shape, w_shape))
    g = rng.standard_normal(np.einsum(equation, x, w).shape).astype(np.float32)
    value, pull = jax.vjp(lambda x, w: jnp.einsum(equation, x, w), x, w)
    w_axes = " ".join({"d": "embed", "f": "mlp", "v": "vocab"}[c] for c in equation[4 : equation.index("-")])
    with jax.set_mesh(Mesh.Config().build(jax.devices()[:devices])):
        rows = jax.sharding.NamedSharding(jax.sharding.get_mesh(), jax.P("fsdp"))

        @jax.jit
        def both(x: jax.Array, w: jax.Array, g: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            value, pull = jax.vjp(lambda x, w: einsum(equation, x, Param(w, axes=w_axes), axes), x, w)
            return value, pull(g)

        spec = rules.stored(w_axes, w_shape)
        assert "fsdp" in spec
        at_rest = jax.device_put(w, jax.NamedSharding(jax.sharding.get_mesh(), spec))
        mine, gradients = both(jax.device_put(x, rows), at_rest, jax.device_put(g, rows))
        assert gradients[1].sharding.spec == spec
    np.testing.assert_allclose(mine, value, rtol=0, atol=1e-5)
    for ours, theirs in zip(gradients, pull(g), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
