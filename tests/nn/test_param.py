"""The sharded product beside plain `jnp.einsum`: value and both gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmgpt.dist.mesh import Mesh
from mmgpt.nn.param import einsum


@pytest.mark.parametrize(
    ("equation", "x_shape", "w_shape", "axes"),
    [
        ("btd,dhk->bthk", (4, 6, 8), (8, 2, 3), "batch seq heads head_dim"),
        ("bthk,hkd->btd", (4, 6, 2, 3), (2, 3, 8), "batch seq embed"),
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
    with jax.set_mesh(Mesh.Config().build(jax.devices()[:devices])):
        rows = jax.sharding.NamedSharding(jax.sharding.get_mesh(), jax.P("fsdp"))

        @jax.jit
        def both(x: jax.Array, w: jax.Array, g: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            value, pull = jax.vjp(lambda x, w: einsum(equation, x, w, axes), x, w)
            return value, pull(g)

        mine, gradients = both(jax.device_put(x, rows), w, jax.device_put(g, rows))
    np.testing.assert_allclose(mine, value, rtol=0, atol=1e-5)
    for ours, theirs in zip(gradients, pull(g), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
