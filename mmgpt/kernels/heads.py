"""Heads of queries and keys on a TPU, from a projection's output to what attention reads, in one pass over memory.

A kernel norms each head (if wanted), turns it by its rotary position, multiplies it, and writes it to where attention's
kernel looks for it, heads before positions. XLA does that in pieces: halves of heads, padded to 128 lanes, float32
between them, and copies. The backward kernel takes the same way back.

A step of the grid is `ROWS` positions of as many heads as make up `WIDTH` numbers.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mmgpt.dist.mesh import platform
from mmgpt.kernels.attention.logits import product

HEAD_DIMS = (128, 256)
"""Whole registers of lanes."""
ROWS, WIDTH = 256, 4096
"""2 MB of bfloat16 a step and array: the transfer takes far longer than it takes to begin."""
CHUNK = 128
"""Positions of a head that are worked on together: fewer leave units idle, by the schedules of a v6e."""
SUBLANES = 8

PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel",) * 3, vmem_limit_bytes=30 * 2**20)


def served(head_dim: int) -> bool:
    """Whether `turned` is for heads of this size and for the current mesh's devices."""
    return platform() == "tpu" and head_dim in HEAD_DIMS


class Static(NamedTuple):
    """What the kernels are compiled for; no norm without an `epsilon`. `interpret` is what Pallas takes."""

    head_dim: int
    factor: float
    epsilon: float | None
    interpret: Any


def turned(
    x_BTN: jax.Array,
    by_BTK: jax.Array,
    gain_K: jax.Array | None = None,
    *,
    head_dim: int,
    factor: float = 1.0,
    epsilon: float = 0.0,
    interpret: Any = False,
) -> jax.Array:
    """`x [B, T, H * K]` as heads `[B, T, H, K]` that lie as `[H, B, T, K]`, turned and multiplied with `factor`.

    `by` has the cosines and then the sines of each position, float32; with a `gain`, heads are first normed by their
    root mean square and `epsilon`. Float32 inside, one rounding. Not differentiable by `by`.
    """
    static = Static(head_dim, factor, None if gain_K is None else epsilon, interpret)
    gain = jnp.ones(head_dim, jnp.float32) if gain_K is None else gain_K.astype(jnp.float32)
    made: jax.Array = _turned(static, x_BTN, by_BTK, gain)
    return made.transpose(1, 2, 0, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _turned(static: Static, x: jax.Array, by: jax.Array, gain: jax.Array) -> jax.Array:
    return _forward(static, x, by, gain)[0]


class _Specs(NamedTuple):
    """The grid (rows, blocks of positions, groups of heads), and the blocks of the arrays."""

    grid: tuple[int, int, int]
    flat: pl.BlockSpec
    heads: pl.BlockSpec
    by: pl.BlockSpec
    gain: pl.BlockSpec
    sums: pl.BlockSpec

    @classmethod
    def of(cls, B: int, T: int, H: int, K: int) -> "_Specs":
        t = min(ROWS, -(-T // CHUNK) * CHUNK)
        h = max(n for n in range(1, H + 1) if H % n == 0 and (n == 1 or n * K <= WIDTH))
        return cls(
            grid=(B, -(-T // t), H // h),
            flat=pl.BlockSpec((1, t, h * K), lambda b, i, g: (b, i, g)),
            heads=pl.BlockSpec((h, 1, t, K), lambda b, i, g: (g, b, i, 0)),
            by=pl.BlockSpec((1, t, K), lambda b, i, g: (b, i, 0)),
            gain=pl.BlockSpec((1, K), lambda b, i, g: (0, 0)),
            sums=pl.BlockSpec((1, 1, 1, SUBLANES, K), lambda b, i, g: (b, i, g, 0, 0)),
        )


def _swapped(x: jax.Array) -> jax.Array:
    """The halves of each head in the other order."""
    return pltpu.roll(x, x.shape[-1] // 2, axis=1)


def _both_halves(by: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines, and sines with the sign that they have in a head's first and second half, for whole heads."""
    other = _swapped(by)
    first = jax.lax.broadcasted_iota(jnp.int32, by.shape, 1) < by.shape[1] // 2
    return jnp.where(first, by, other), jnp.where(first, -other, by)


def _mean(x: jax.Array, dtype: Any) -> jax.Array:
    """The mean of each row, on all lanes. A product with ones: the matrix units have nothing else to do, while sums
    over lanes would take longer than the memory. Bfloat16 heads have terms rounded to that: 1e-4 of their mean.
    """
    return product(x.astype(dtype), jnp.full((x.shape[1], x.shape[1]), 1.0 / x.shape[1], dtype), 1, 0)


def _inverse(x: jax.Array, epsilon: float, dtype: Any) -> jax.Array:
    """One over the root mean square of each row."""
    return jax.lax.rsqrt(_mean(x * x, dtype) + epsilon)


def _each_chunk(rows: int, body: Any) -> None:
    jax.lax.fori_loop(0, rows // CHUNK, lambda i, _: body(pl.ds(pl.multiple_of(i * CHUNK, CHUNK), CHUNK)), None)


def _forward_kernel(x: Any, by: Any, gain: Any, out: Any, *, static: Static) -> None:
    K = static.head_dim

    def body(here: Any) -> None:
        cos, sin = _both_halves(by[0, here, :])
        straight, crossed = cos * (gain[...] * static.factor), sin * (_swapped(gain[...]) * static.factor)
        for h in range(out.shape[0]):
            head = x[0, here, h * K : (h + 1) * K].astype(jnp.float32)
            made = head * straight + _swapped(head) * crossed
            if static.epsilon is not None:
                made *= _inverse(head, static.epsilon, x.dtype)
            out[h, 0, here, :] = made.astype(out.dtype)

    _each_chunk(out.shape[2], body)


def _forward(static: Static, x: jax.Array, by: jax.Array, gain: jax.Array) -> tuple[jax.Array, Any]:
    (B, T, N), K = x.shape, static.head_dim
    at = _Specs.of(B, T, N // K, K)
    made = pl.pallas_call(
        functools.partial(_forward_kernel, static=static),
        grid=at.grid,
        in_specs=[at.flat, at.by, at.gain],
        out_specs=at.heads,
        out_shape=jax.ShapeDtypeStruct((N // K, B, T, K), x.dtype),
        compiler_params=PARAMS,
        name="heads_forward",
        interpret=static.interpret,
    )(x, by, gain[None])
    return made, (None if static.epsilon is None else x, by, gain)


def _backward_kernel(g: Any, by: Any, dx: Any, *, static: Static) -> None:
    K = static.head_dim

    def body(here: Any) -> None:
        cos, sin = (part * static.factor for part in _both_halves(by[0, here, :]))
        for h in range(g.shape[0]):
            head = g[h, 0, here, :].astype(jnp.float32)
            dx[0, here, h * K : (h + 1) * K] = (head * cos - _swapped(head) * sin).astype(dx.dtype)

    _each_chunk(g.shape[2], body)


def _normed_backward_kernel(g: Any, by: Any, gain: Any, x: Any, dx: Any, dgain: Any, *, static: Static, T: int) -> None:
    K, rows = static.head_dim, g.shape[2]
    epsilon = static.epsilon
    assert epsilon is not None
    first = pl.program_id(1) * rows
    dgain[...] = jnp.zeros_like(dgain)

    def body(here: Any) -> None:
        cos, sin = (part * static.factor for part in _both_halves(by[0, here, :]))
        total = jnp.zeros((CHUNK, K), jnp.float32)
        for h in range(g.shape[0]):
            head, own = g[h, 0, here, :].astype(jnp.float32), slice(h * K, (h + 1) * K)
            flat = x[0, here, own].astype(jnp.float32)
            inverse = _inverse(flat, epsilon, x.dtype)
            of_normed = head * cos - _swapped(head) * sin
            along = _mean(of_normed * flat * gain[...], x.dtype)
            total += of_normed * flat * inverse
            made = inverse * (of_normed * gain[...] - flat * (inverse * inverse * along))
            dx[0, here, own] = made.astype(dx.dtype)
        if T % rows:  # beyond the last position there is anything
            at = first + here.start + jax.lax.broadcasted_iota(jnp.int32, total.shape, 0)
            total = jnp.where(at < T, total, 0.0)
        dgain[0, 0, 0] += jnp.sum(total.reshape(-1, SUBLANES, K), axis=0)

    _each_chunk(rows, body)


def _backward(static: Static, saved: Any, g: jax.Array) -> tuple[jax.Array, None, jax.Array | None]:
    x, by, gain = saved
    H, B, T, K = g.shape
    at = _Specs.of(B, T, H, K)
    flat = jax.ShapeDtypeStruct((B, T, H * K), g.dtype)
    call = functools.partial(
        pl.pallas_call, grid=at.grid, compiler_params=PARAMS, name="heads_backward", interpret=static.interpret
    )
    if static.epsilon is None:
        kernel = functools.partial(_backward_kernel, static=static)
        dx = call(kernel, in_specs=[at.heads, at.by], out_specs=at.flat, out_shape=flat)(g, by)
        return dx, None, None
    dx, dgain = call(
        functools.partial(_normed_backward_kernel, static=static, T=T),
        in_specs=[at.heads, at.by, at.gain, at.flat],
        out_specs=[at.flat, at.sums],
        out_shape=[flat, jax.ShapeDtypeStruct((*at.grid, SUBLANES, K), jnp.float32)],
    )(g, by, gain[None], x)
    return dx, None, jnp.sum(dgain, axis=(0, 1, 2, 3))


_turned.defvjp(_forward, _backward)
