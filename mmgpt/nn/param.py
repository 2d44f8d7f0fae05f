"""The sharding verbs: `param` makes a weight, `use` gathers it, `einsum` and `act` lay out activations.

`by_row` runs a function on each device's own rows, where nothing crosses from one row to another.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmgpt.dist import axes as rules

Init = Callable[..., jax.Array]


class Param(nnx.Param):
    """A weight with the logical names of its dimensions (`axes`), a thin `nnx.Param`."""


class Variable(nnx.Variable):
    """An array that is state but not trained by a gradient: running statistics, codebook counts."""


class Keys(nnx.Rngs):
    """The keys of fresh parameters, those of `nnx.Rngs(params=key)`, counted outside of the trace.

    nnx counts with a traced array, whose every update costs time in all that was traced before: half a minute for the
    thousand parameters of an image tokenizer.
    """

    def __init__(self, key: jax.Array):
        self._key, self._made = key, 0

    def params(self) -> jax.Array:
        """The next key."""
        self._made += 1
        return jax.random.fold_in(self._key, self._made - 1)


def normal(scale: float) -> Init:
    """Truncation-free normal initialiser with a fixed standard deviation."""
    return lambda key, shape: jax.random.normal(key, shape, jnp.float32) * scale


def constant(value: float) -> Init:
    """Initialiser with one value everywhere."""
    return lambda key, shape: jnp.full(shape, value, jnp.float32)


def zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.zeros(shape, jnp.float32)


def param(rngs: nnx.Rngs, axes: str, shape: tuple[int, ...], init: Init, *, kind: type[Any] = Param) -> Any:
    """A float32 weight of `shape`, stored as the rules table says for its logical `axes`."""
    spec = rules.stored(axes, shape)
    return kind(jax.sharding.reshard(init(rngs.params(), shape), spec), axes=axes)


def use(weight: Any, dtype: jnp.dtype | type = jnp.float32) -> jax.Array:
    """The weight as a matmul takes it: cast to the compute dtype, then gathered over `fsdp`."""
    value = weight[...].astype(dtype)
    return jax.sharding.reshard(value, rules.spec(weight.axes, rules.USE, value.shape, "weight"))


def einsum(equation: str, x: jax.Array, w: Any, axes: str) -> jax.Array:
    """`jnp.einsum` of an activation and a weight as `use` gives it, in `x`'s dtype; the result has the logical `axes`.

    The backward pass gathers the weight again, and adds its gradient up (in that dtype) right where the weight lies at
    rest: a reduce-scatter over `fsdp`, where the gradient of a gathered weight would be a whole one on every device.
    """
    return _product(equation, rules.spec(axes, rules.ACT), rules.spec(w.axes, rules.USE), x, w[...])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(equation: str, out: Any, whole: Any, x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, jax.sharding.reshard(w.astype(x.dtype), whole), out_sharding=out)


def _forward(equation: str, out: Any, whole: Any, x: jax.Array, w: jax.Array) -> tuple[jax.Array, Any]:
    gathered = jax.sharding.reshard(w.astype(x.dtype), whole)
    return jnp.einsum(equation, x, gathered, out_sharding=out), (x, w)  # plain: a remat policy sees the product


def _backward(equation: str, out: Any, whole: Any, saved: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As JAX's own rule, but `w`'s gradient comes from (x, g) and not from (g, x): the CPU transposes its left side,
    and `x` is shared by several products.
    """
    x, w = saved
    (a, b), c = equation.split("->")[0].split(","), equation.split("->")[1]
    gathered = jax.sharding.reshard(w.astype(x.dtype), whole)
    dx = jnp.einsum(f"{c},{b}->{a}", g, gathered, out_sharding=jax.typeof(x).sharding.spec)
    dw = jnp.einsum(f"{a},{c}->{b}", x, g, out_sharding=jax.typeof(w).sharding.spec)
    return dx, dw.astype(w.dtype)


_product.defvjp(_forward, _backward)


def act(x: jax.Array, axes: str) -> jax.Array:
    """An activation laid out by its logical `axes`."""
    return jax.sharding.reshard(x, rules.spec(axes, rules.ACT, x.shape, "activation"))


def take(table: jax.Array, ids: jax.Array, axes: str) -> jax.Array:
    """Rows of `table [V, D]` by `ids`, as a gather: one-hot matmuls cost 50 times more in the CPU's backward pass."""
    return table.at[ids].get(out_sharding=rules.spec(axes, rules.ACT))


def lookup(weight: Any, ids_BT: jax.Array, dtype: jnp.dtype | type) -> jax.Array:
    """Rows `[B, T, D]` in `dtype` of an embedding `[V, D]`: as `take`, with the weight as it lies at rest.

    Where `tensor` divides the ids, a device looks up those that it has, and the others' rows are added to its zeros.
    The gradient is added up in float32 on a device, and in `dtype` over devices, in a reduce-scatter over `fsdp`.
    """
    return _rows(jnp.dtype(dtype), weight[...], act(ids_BT, "batch seq"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(dtype: jnp.dtype, table: jax.Array, ids: jax.Array) -> jax.Array:
    at_rest = jax.typeof(table).sharding.spec
    spread = rules.divided(at_rest, "fsdp")

    def local(table: jax.Array, ids: jax.Array) -> jax.Array:
        table = table.astype(dtype)
        if spread is not None:
            table = jax.lax.all_gather(table, "fsdp", axis=spread, tiled=True)
        if rules.divided(at_rest, "tensor") is None:
            return table.at[ids].get()
        return jax.lax.psum(table.at[_own(ids, table.shape[0])].get(mode="fill", fill_value=0), "tensor")

    by_position, out = (rules.spec(axes, rules.ACT) for axes in ("batch seq", "batch seq embed"))
    return jax.shard_map(local, in_specs=(at_rest, by_position), out_specs=out, check_vma=False)(table, ids)


def _rows_backward(dtype: jnp.dtype, saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, None]:
    table, ids = saved
    at_rest, mesh = jax.typeof(table).sharding.spec, jax.sharding.get_abstract_mesh().shape
    spread, split = rules.divided(at_rest, "fsdp"), rules.divided(at_rest, "tensor") is not None
    shape = (table.shape[0] // (mesh["tensor"] if split else 1), table.shape[1])
    others = tuple(a for a in ("replica", "fsdp", "context") if mesh[a] > 1 and (a != "fsdp" or spread is None))

    def local(g: jax.Array, ids: jax.Array) -> jax.Array:
        at = _own(ids, shape[0]) if split else ids
        found = jnp.zeros(shape, jnp.float32).at[at].add(g.astype(jnp.float32), mode="drop").astype(dtype)
        if spread is not None:
            found = jax.lax.psum_scatter(found, "fsdp", scatter_dimension=spread, tiled=True)
        return jax.lax.psum(found, others).astype(table.dtype)

    by_position, g_spec = (rules.spec(axes, rules.ACT) for axes in ("batch seq", "batch seq embed"))
    pulled = jax.shard_map(local, in_specs=(g_spec, by_position), out_specs=at_rest, check_vma=False)(g, ids)
    return pulled, None


def _own(ids: jax.Array, rows: int) -> jax.Array:
    """Which of a device's rows the ids are; `rows`, beyond the last, for those of other devices."""
    at = ids - jax.lax.axis_index("tensor") * rows
    return jnp.where((at >= 0) & (at < rows), at, rows)


_rows.defvjp(lambda dtype, table, ids: (_rows(dtype, table, ids), (table, ids)), _rows_backward)


def by_row(function: Callable[[jax.Array, Any], jax.Array], x: jax.Array, whole: Any, axes: str) -> jax.Array:
    """`function(x, whole)` on each device's rows of `x`, laid out by `axes` in and out; every device has `whole`."""
    rows, every = rules.spec(axes, rules.ACT), rules.spec("", rules.ACT)
    return jax.shard_map(function, in_specs=(rows, every), out_specs=rows)(act(x, axes), whole)
