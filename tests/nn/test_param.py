"""The sharded product and lookup beside plain ones: values and gradients."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmgpt.dist import axes as rules
from mmgpt.dist.mesh import Mesh
from mmgpt.nn.param import Param, einsum, lookup


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


MESHES = {
    "one": Mesh.Config(),
    "fsdp": Mesh.Config(fsdp=8),
    "replica, fsdp": Mesh.Config(replica=2, fsdp=4),
    "fsdp, tensor": Mesh.Config(fsdp=2, tensor=4),
    "tensor": Mesh.Config(tensor=2, context=4, fsdp=1),
    "all": Mesh.Config(fsdp=2, context=2, tensor=2),
}


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize(("V", "width"), [(48, 6), (36, 32)])  # `fsdp` divides ids, and where it does not, widths
def test_a_lookup_is_that_of_the_whole_table(name: str, V: int, width: int) -> None:
    B, T = 8, 12
    rng = np.random.default_rng(0)
    table, g = rng.standard_normal((V, width)).astype(np.float32), rng.standard_normal((B, T, width)).astype(np.float32)
    ids = rng.integers(0, V, (B, T)).astype(np.int32)
    ids[0, :4] = 0, V - 1, V // 2, V // 2 - 1  # where parts begin and end
    ids[1:5] = 7  # many times the same
    value, pull = jax.vjp(lambda table: table[ids], table)
    mesh = MESHES[name].build(jax.devices()[:1] if name == "one" else None)
    with jax.set_mesh(mesh):
        at_rest = rules.stored("vocab embed", table.shape)
        places = [jax.NamedSharding(mesh, spec) for spec in (at_rest, *map(_act, ("batch seq", "batch seq embed")))]
        given = [jax.device_put(*pair) for pair in zip((table, ids, g), places, strict=True)]

        @jax.jit
        def both(table: jax.Array, ids: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
            value, pull = jax.vjp(lambda table: lookup(Param(table, axes="vocab embed"), ids, jnp.float32), table)
            return value, pull(g)[0]

        mine, gradient = both(*given)
        assert mine.sharding.spec == places[2].spec and gradient.sharding.spec == at_rest
        program = both.lower(*given).compile().as_text()
    assert np.array_equal(mine, value)
    np.testing.assert_allclose(gradient, pull(g)[0], rtol=0, atol=1e-5)
    part = V // MESHES[name].tensor * width
    gathers = _results(program, "all-gather")
    assert gathers == (
        [part] if rules.divided(at_rest, "fsdp") is not None else []
    )  # over fsdp alone: a part of the table
    reduced = [V * width // mesh.shape["fsdp"] // MESHES[name].tensor] if gathers else []
    assert _results(program, "reduce-scatter") == reduced


def test_a_lookups_gradient_is_added_up_in_float32() -> None:
    with jax.set_mesh(Mesh.Config().build(jax.devices()[:1])):
        ids = jnp.zeros((8, 512), jnp.int32)
        table, ones = jnp.zeros((4, 2)), jnp.ones((8, 512, 2), jnp.bfloat16)
        _, pull = jax.vjp(lambda table: lookup(Param(table, axes="vocab embed"), ids, jnp.bfloat16), table)
        assert np.array_equal(pull(ones)[0], [[4096.0] * 2] + [[0.0] * 2] * 3)  # in bfloat16 256 + 1 is 256


def _act(axes: str) -> jax.P:
    return rules.spec(axes, rules.ACT)


def _results(program: str, kind: str) -> list[int]:
    """The sizes of what a device gets of each collective of a kind."""
    found = re.findall(rf" = \w+\[([\d,]*)\]\S* {kind}(?:-start)?\(", program)
    return [math.prod(int(n) for n in shape.split(",")) for shape in found]
