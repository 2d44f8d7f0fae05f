"""Attention on a GPU over the blocks of a plan: Pallas kernels that Triton compiles, and the gradient.

A program works for one block of queries and one head (for one block of keys and one key head, where it makes dk and
dv), and walks over that block's entries in the plan, and no others: what is not seen costs nothing, and no sum is
shared between programs, so there are no atomics and every run gives the same bits. Arrays stay as the model has them,
positions before heads: a block is rows of K numbers, and nothing is transposed or repeated for it.

cuDNN's kernels know no documents: they get the rows that are causal throughout (`cudnn.py`).

Shapes: N queries and M keys of all rows, filled up to whole blocks; H query heads over G key heads; K head dim.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmgpt.dist.mesh import platform
from mmgpt.kernels.attention import cudnn, ring
from mmgpt.kernels.attention.logits import LOG2E, UNSEEN, Options, filled, kept, settled, solved_for
from mmgpt.kernels.attention.pallas_gpu_kernels import Static, backward, forward
from mmgpt.kernels.attention.plan import Blocks, Plan
from mmgpt.kernels.attention.ring import Ring, Steps

LEAST = 16
"""Rows and columns of the smallest operand of a tensor core."""
MOST_HEAD_DIM = 256
QUERIES, KEYS = 128, 64
"""Of a block: two warpgroups hold its float32 sums and logits in registers, and an edge wastes half of 64 keys."""


def blocks(T: int, S: int, K: int) -> Blocks:
    """Blocks for T queries and S keys of heads of K numbers; twice the head dim leaves room for half the queries."""
    return Blocks(_side(T, QUERIES if K <= 128 else QUERIES // 2), _side(S, KEYS))


def _side(length: int, most: int) -> int:
    """A power of 2 from 16 to `most`, no larger than the length needs."""
    found = LEAST
    while found < min(most, length):
        found *= 2
    return found


class _Way(NamedTuple):
    """What is known when the program is compiled; `causal`: cuDNN takes the plan if it is causal, as the step runs."""

    static: Static
    causal: bool


def attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    plan: Plan | Ring,
    *,
    scale: float,
    soft_cap: float | None,
    sinks_H: jax.Array | None,
    logit_bound: float | jax.Array | None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """`(out [B, T, H, K], lse [B, T, H] float32)`; a query that sees nothing yields zeros, and lse -inf or its sink.

    `logit_bound` up to 64 (or a soft cap, which is one) spares the running maximum; an array decides as the step runs.
    `interpret`: what Pallas takes, to run it without a GPU. Raises ValueError for head dims beyond 256, and for blocks
    that Triton does not take. A Ring takes no sinks.
    """
    B, T, _, K = q_BTHK.shape
    if K > MOST_HEAD_DIM:
        raise ValueError(f"attention: 'pallas_gpu' has head dims up to {MOST_HEAD_DIM} and got {K}; take 'xla'.")
    plans = plan.plans if isinstance(plan, Ring) else plan
    if any(side < LEAST or side & (side - 1) for side in plans.blocks):
        raise ValueError(f"attention: 'pallas_gpu' has blocks of powers of 2 from {LEAST} on and got {plans.blocks}.")
    plans.check(B, T, k_BSGK.shape[1])
    options = Options(soft_cap=soft_cap, sinks=sinks_H is not None)
    options, bound = settled(logit_bound, options)
    # A program for a GPU that is not here goes without cuDNN: JAX asks it for its version.
    there = not interpret and platform() == "gpu" and jax.default_backend() != "cpu"
    causal = there and cudnn.fits(q_BTHK, k_BSGK, soft_cap, sinks_H)
    sinks = None if sinks_H is None else sinks_H.astype(jnp.float32)
    way = _Way(Static(scale, options, interpret), causal)
    if isinstance(plan, Ring):
        # Queries whose plan is causal in one step see nothing in the others: cuDNN's output of it is all of theirs.
        return ring.attention(Steps(_solve, _gradients, way), q_BTHK, k_BSGK, v_BSGK, plan, bound)
    solved: Any = _attention(way, q_BTHK, k_BSGK, v_BSGK, sinks, plan, bound)
    return solved


def _laid_out(x_BTHK: jax.Array, size: int) -> jax.Array:
    """`[N, H, K]`: all rows, filled up to whole blocks, and columns to a multiple of what a tensor core takes."""
    columns = -x_BTHK.shape[3] % LEAST
    x = filled(x_BTHK, size)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, columns))) if columns else x
    return x.reshape(-1, *x.shape[2:])


def _given_back(x_NHK: jax.Array, like_BTHK: jax.Array) -> jax.Array:
    B, T, H, K = like_BTHK.shape
    return x_NHK.reshape(B, -1, H, x_NHK.shape[2])[:, :T, :, :K]


def _turned(x_BTH: jax.Array, size: int, value: float) -> jax.Array:
    """`[H, N]`, filled up to whole blocks."""
    x = jnp.pad(x_BTH, ((0, 0), (0, -x_BTH.shape[1] % size), (0, 0)), constant_values=value)
    return x.reshape(-1, x.shape[2]).T


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(way: _Way, q, k, v, sinks, plan: Plan, bound) -> tuple[jax.Array, jax.Array]:
    return _solve(way, q, k, v, sinks, plan, bound)[0]


def _solve(way: _Way, q, k, v, sinks, plan: Plan, bound) -> Any:
    """`bound`: whether logits are bounded, as the step runs; None where the options say it."""
    static, (B, T, H, _) = way.static, q.shape

    def by_blocks() -> tuple[jax.Array, jax.Array]:
        bq, bk = plan.blocks
        q_NHK, k_MGK, v_MGK = _laid_out(q, bq), _laid_out(k, bk), _laid_out(v, bk)
        start = jnp.zeros((H,), jnp.float32) if sinks is None else sinks

        def solve(options: Options) -> tuple[jax.Array, jax.Array]:
            return forward(q_NHK, k_MGK, v_MGK, start, plan, static._replace(options=options))

        out, lse = solved_for(static.options, bound, solve)
        return _given_back(out, q), lse.T.reshape(B, -1, H)[:, :T]

    if way.causal:
        out, lse = jax.lax.cond(plan.causal[0], lambda: cudnn.attention(q, k, v, static.scale), by_blocks)
    else:
        out, lse = by_blocks()
    out, lse = kept(out, lse)
    return (out, lse), (q, k, v, sinks, plan, out, lse)


def _gradients(way: _Way, saved: Any, cotangents: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    (q, k, v, sinks, plan, out, lse), static = saved, way.static
    do, dlse = cotangents
    do, blind = do.astype(v.dtype), jnp.isneginf(lse)
    # A probability's logit moves out, and lse by the probability itself: both take part in every logit's gradient.
    moved = jnp.sum(do.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - dlse
    di = jnp.where(blind, 0.0, moved)

    def by_blocks() -> tuple[jax.Array, ...]:
        bq, bk = plan.blocks
        arrays = _laid_out(q, bq), _laid_out(k, bk), _laid_out(v, bk), _laid_out(do, bq)
        log2_sum = _turned(jnp.where(blind, UNSEEN, lse * LOG2E), bq, UNSEEN)
        found = backward(*arrays, log2_sum, _turned(di, bq, 0.0), plan, static)
        return tuple(_given_back(x, like) for x, like in zip(found, (q, k, v), strict=True))

    if way.causal:
        # cuDNN has no gradient of lse: where anyone asks for one, as the step runs, the kernels here do.
        alone = plan.causal[0] & jnp.all(dlse == 0.0)
        dq, dk, dv = jax.lax.cond(alone, lambda: cudnn.gradients(q, k, v, do, static.scale), by_blocks)
    else:
        dq, dk, dv = by_blocks()
    dsinks = None
    if sinks is not None:
        # A sink's weight in the sum takes from all outputs, and adds to lse.
        dsinks = -jnp.sum(jnp.exp(sinks[None, None] - jnp.where(blind, 0.0, lse)) * di, axis=(0, 1))
    return dq, dk, dv, dsinks, None, None


_attention.defvjp(_solve, _gradients)
