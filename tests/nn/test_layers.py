"""The layers against their formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmgpt.dist import axes as rules
from mmgpt.dist.mesh import Mesh
from mmgpt.nn.layers import GatedMLP, RMSNorm, dropout, rotary, turn


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(Mesh.Config().build(jax.devices()[:1])):
        yield


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_rms_norm() -> None:
    norm, x = RMSNorm(nnx.Rngs(0), 8, 1e-5), draw(2, 3, 8)
    norm.scale[...] = jnp.asarray(draw(8, seed=1))
    wide = x.astype(np.float64)
    expected = wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + 1e-5) * draw(8, seed=1)
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, atol=1e-6)
    half = norm(jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(half, np.float32), expected, atol=4e-2)


def test_gated_mlp() -> None:
    mlp, x = GatedMLP(nnx.Rngs(0), 8, 12, 1.0), draw(2, 3, 8)
    gate, up, down = (np.asarray(w[...], np.float64) for w in (mlp.gate, mlp.up, mlp.down))
    hidden = x @ gate
    expected = (hidden / (1 + np.exp(-hidden)) * (x @ up)) @ down
    np.testing.assert_allclose(mlp(jnp.asarray(x)), expected, atol=1e-5)


def test_rotary_turns_pairs_and_keeps_relative_angles() -> None:
    q, k = draw(1, 1, 2, 8), draw(1, 1, 2, 8, seed=1)

    def product(a: int, b: int) -> np.ndarray:
        turned = [rotary(jnp.asarray(x), turn(jnp.array([[[p, 0, 0]]]), 8, 100.0, 0, 1.0)) for x, p in ((q, a), (k, b))]
        return np.asarray(jnp.sum(turned[0] * turned[1], axis=-1))

    np.testing.assert_allclose(product(7, 3), product(104, 100), atol=1e-5)
    np.testing.assert_allclose(product(5, 5), np.sum(q * k, axis=-1), atol=1e-5)
    assert not np.allclose(product(7, 3), product(7, 4), atol=1e-2)
    turned = np.asarray(rotary(jnp.asarray(q), turn(jnp.array([[[3, 5, 7]]]), 8, 100.0, 1, 10.0)), np.float64)
    for i in range(4):
        angle = (3, 3 * 100.0**-0.5, 5, 7)[i]  # two frequencies of the number, then the row's and the column's
        z = (q[0, 0, :, i] + 1j * q[0, 0, :, i + 4]) * np.exp(1j * angle)
        np.testing.assert_allclose(turned[0, 0, :, i] + 1j * turned[0, 0, :, i + 4], z, atol=1e-6)


def test_dropout_drops_its_share_and_only_with_a_key() -> None:
    x = jnp.ones((4, 50, 50))
    assert dropout(x, 0.3, None) is x and dropout(x, 0.0, jax.random.key(0)) is x
    dropped = np.asarray(dropout(x, 0.3, jax.random.key(0)))
    assert abs((dropped == 0).mean() - 0.3) < 0.02
    np.testing.assert_allclose(dropped[dropped > 0], 1 / 0.7, rtol=1e-6)


def test_each_device_draws_what_it_drops_of_its_own_part() -> None:
    found = []
    for mesh in (Mesh.Config(fsdp=1), Mesh.Config(fsdp=2, context=4)):
        devices = jax.devices()[: 1 if mesh.context == 1 else 8]
        with jax.set_mesh(mesh.build(devices)):
            x = jax.device_put(np.ones((4, 24, 40), np.float32), rules.sharding("batch seq embed", rules.ACT))
            compiled = jax.jit(lambda x: dropout(x, 0.5, jax.random.key(3))).lower(x).compile()
            found.append((np.asarray(compiled(x)), compiled.as_text()))
    (alone, _), (split, program) = found
    np.testing.assert_array_equal(alone, split)
    assert "[2,6,40]" in program and "[4,24,40]" not in program
