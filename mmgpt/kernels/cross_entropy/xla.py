"""Cross-entropy chunk by chunk: logits of a few hundred positions at once, and both gradients made with them.

Each device has its own positions, and its part of the vocabulary where `tensor` divides that. It gathers the weight
over `fsdp`, and hands its gradient back in a reduce-scatter. N positions of a device, n of a chunk.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmgpt.dist import axes as rules
from mmgpt.kernels.cross_entropy.scores import Scores


class _Static(NamedTuple):
    used: int
    z_loss: float
    rows: bool
    chunk_bytes: int


def cross_entropy(
    x_BTD: jax.Array,
    w: jax.Array,
    target_BT: jax.Array,
    weight_BT: jax.Array,
    *,
    used: int,
    z_loss: float,
    rows: bool,
    chunk_bytes: int,
) -> tuple[jax.Array, Scores]:
    """As `api.cross_entropy`."""
    scored: Any = _scored(_Static(used, z_loss, rows, chunk_bytes), x_BTD, w, target_BT, weight_BT)
    return scored


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scored(static: _Static, x: jax.Array, w: jax.Array, target: jax.Array, weight: jax.Array) -> Any:
    return _on_each_device(static, x, w, target, weight, gradients=False)[0]


def _forward(static: _Static, x: jax.Array, w: jax.Array, target: jax.Array, weight: jax.Array) -> Any:
    return _on_each_device(static, x, w, target, weight, gradients=True)


def _backward(static: _Static, saved: tuple[jax.Array, jax.Array], cotangents: Any) -> tuple[Any, ...]:
    (dx, dw), (g, _) = saved, cotangents
    return (g * dx).astype(dx.dtype), g * dw, None, None


_scored.defvjp(_forward, _backward)


def _on_each_device(
    static: _Static, x: jax.Array, w: jax.Array, target: jax.Array, weight: jax.Array, *, gradients: bool
) -> tuple[tuple[jax.Array, Scores], tuple[jax.Array, jax.Array] | None]:
    """`((total, scores), (dx, dw) | None)` of the whole batch."""
    mesh = jax.sharding.get_abstract_mesh().shape
    at_rest = jax.typeof(w).sharding.spec
    x_spec, by_position = rules.spec("batch seq embed", rules.ACT), rules.spec("batch seq", rules.ACT)
    over_rows = tuple(a for a in ("replica", "fsdp", "context") if mesh[a] > 1)
    spread = rules.divided(at_rest, "fsdp")
    V = w.shape[0 if static.rows else 1]

    def local(x: jax.Array, w: jax.Array, target: jax.Array, weight: jax.Array) -> Any:
        w = w.astype(x.dtype)
        if spread is not None:
            w = jax.lax.all_gather(w, "fsdp", axis=spread, tiled=True)
        chunked = _Chunks(static, w, V, split=mesh["tensor"] > 1, gradients=gradients)
        total, scores, grads = chunked.all(x, target, weight)
        total = jax.lax.psum(total, over_rows)
        if grads is None:
            return total, scores
        dx, dw = grads
        if mesh["tensor"] > 1:
            dx = jax.lax.psum(dx, "tensor")
        if spread is not None:
            dw = jax.lax.psum_scatter(dw, "fsdp", scatter_dimension=spread, tiled=True)
        others = tuple(a for a in over_rows if a != "fsdp" or spread is None)
        return total, scores, dx.astype(x.dtype), jax.lax.psum(dw, others)

    whole = jax.P()
    of_scores: Any = Scores(*(by_position,) * 3)  # pyright: ignore[reportArgumentType] - specs in place of arrays
    outs = (whole, of_scores, x_spec, at_rest)
    found = jax.shard_map(
        local,
        in_specs=(x_spec, at_rest, by_position, by_position),
        out_specs=outs if gradients else outs[:2],
        check_vma=False,
    )(x, w, target, weight)
    return found[:2], (found[2:] if gradients else None)


class _Chunks(NamedTuple):
    """A device's vocabulary, and what is made of its positions; `split`: other devices have the rest of the ids."""

    static: _Static
    w: jax.Array
    vocab: int
    split: bool
    gradients: bool

    @property
    def columns(self) -> int:
        return self.w.shape[0 if self.static.rows else 1]

    def all(self, x_BTD: jax.Array, target_BT: jax.Array, weight_BT: jax.Array) -> Any:
        """`(total, scores, (dx, dw) | None)`; the sums over other devices are still to be made."""
        B, T = x_BTD.shape[:2]
        N = B * T
        n = _chunk(N, self.columns, self.static.chunk_bytes)
        chunks = -(-N // n)

        def parts(a: jax.Array) -> jax.Array:
            flat = a.reshape(N, *a.shape[2:])
            return jnp.pad(flat, ((0, chunks * n - N), *((0, 0),) * (flat.ndim - 1))).reshape(chunks, n, *a.shape[2:])

        def step(dw: Any, chunk: tuple[jax.Array, ...]) -> tuple[Any, Any]:
            *found, own = self.one(*chunk)
            return (None if dw is None else dw + own), found

        def whole(a: jax.Array) -> jax.Array:
            return a.reshape(chunks * n, *a.shape[2:])[:N].reshape(B, T, *a.shape[2:])

        dw = jnp.zeros(self.w.shape, jnp.float32) if self.gradients else None
        dw, (totals, scores, dx) = jax.lax.scan(step, dw, tuple(map(parts, (x_BTD, target_BT, weight_BT))))
        scores, dx = jax.tree.map(whole, (scores, dx))
        return jnp.sum(totals), scores, ((dx, dw) if self.gradients else None)

    def one(self, x_nD: jax.Array, target_n: jax.Array, weight_n: jax.Array) -> Any:
        """`(total, scores, dx [n, D], dw float32)` of one chunk; without gradients the last two are None."""
        used, z_loss, rows, _ = self.static
        first = jax.lax.axis_index("tensor") * self.columns if self.split else 0
        column = first + jax.lax.broadcasted_iota(jnp.int32, (1, self.columns), 1)
        logits = _product("nd,vd->nv" if rows else "nd,dv->nv", x_nD, self.w)
        if used < self.vocab:
            logits = jnp.where(column < used, logits, -jnp.inf)
        mine = column == target_n[:, None]
        highest = self._over(jax.lax.pmax, jnp.max(logits, axis=1))
        log_z = jnp.log(self._over(jax.lax.psum, jnp.sum(jnp.exp(logits - highest[:, None]), axis=1))) + highest
        picked = self._over(jax.lax.psum, jnp.sum(jnp.where(mine, logits, 0.0), axis=1))
        scores = Scores(log_z - picked, log_z, picked >= highest)
        total = jnp.sum(weight_n * (scores.cross_entropy + z_loss * jnp.square(log_z)))
        if not self.gradients:
            return total, scores, None, None
        slope = weight_n * (1.0 + 2.0 * z_loss * log_z)
        moved = slope[:, None] * jnp.exp(logits - log_z[:, None]) - jnp.where(mine, weight_n[:, None], 0.0)
        moved = moved.astype(x_nD.dtype)
        dx = _product("nv,vd->nd" if rows else "nv,dv->nd", moved, self.w)
        dw = _product("nv,nd->vd" if rows else "nd,nv->dv", *((moved, x_nD) if rows else (x_nD, moved)))
        return total, scores, (dx if self.split else dx.astype(x_nD.dtype)), dw

    def _over(self, reduce: Any, part: jax.Array) -> jax.Array:
        return reduce(part, "tensor") if self.split else part


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _chunk(positions: int, columns: int, room: int) -> int:
    """Positions of a chunk: all, or a power of two whose float32 logits have room, and at least a tile of 8."""
    n = 8
    while 2 * n * columns * 4 <= room:
        n *= 2
    return min(n, positions)
