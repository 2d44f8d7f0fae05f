"""Attention over the blocks of a plan in plain JAX: nothing of T x S, no work where nothing is seen.

Shapes: B rows, T queries, S keys, H query heads over G key heads, R = H / G, K head dim. Inside, arrays are cut into
blocks: N of queries and J of keys, over all rows; M = R q_block is what the query heads of one key head make of a block
of queries, so that keys are never repeated, and C = k_block.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mmgpt.kernels.attention import ring
from mmgpt.kernels.attention.logits import LOWEST, filled, kept
from mmgpt.kernels.attention.plan import EMPTY, FULL, Blocks, Plan, unpacked
from mmgpt.kernels.attention.ring import Ring, Steps

BLOCK = 256
"""Queries and keys of a block. 128 spends its time on the loop, 512 leaves the cache and visits more than is seen."""


def blocks(T: int, S: int, R: int) -> Blocks:
    """The fastest blocks on a CPU for T queries and S keys, R query heads to a key head."""
    # One query head to a key head makes short products: twice as many queries make up for it.
    return Blocks(_block(T, 2 * BLOCK if R == 1 else BLOCK), _block(S, BLOCK))


def _block(length: int, most: int) -> int:
    """At most `most`, a multiple of 16, and the same for all blocks of `length` with little left over."""
    count = -(-length // most)
    return -(-length // (16 * count)) * 16


def attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    plan: Plan | Ring,
    *,
    scale: float,
    soft_cap: float | None,
    sinks_H: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """`(out [B, T, H, K], lse [B, T, H] float32)`; a query that sees nothing yields zeros, and lse -inf or its sink.

    A Ring takes no sinks.
    """
    B, T, H, _ = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    R = H // G
    plans = plan.plans if isinstance(plan, Ring) else plan
    plans.check(B, T, S)
    sinks_GR = None if sinks_H is None else sinks_H.astype(jnp.float32).reshape(G, R)
    arrays = q_BTHK, k_BSGK, v_BSGK, sinks_GR
    q, k, v = (_alike(x, arrays, plan) for x in (q_BTHK, k_BSGK, v_BSGK))
    sinks_GR = None if sinks_GR is None else _alike(sinks_GR, arrays, plan)
    laid, options = _laid_out(q, k, v, plans.blocks), (scale, soft_cap)
    if isinstance(plan, Ring):
        out, lse = ring.attention(Steps(_forward, _backward, options), *laid, plan, None)
    else:
        out, lse = _attention(options, *laid, sinks_GR, plan)
    return _given_back(out, lse, q_BTHK.shape, plans.blocks)


def _laid_out(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, blocks: Blocks
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`q [N, G, M, K]` and `k, v [J, G, C, K]` in blocks, rows filled up."""
    (H, K), G = q_BTHK.shape[2:], k_BSGK.shape[2]
    q = filled(q_BTHK, blocks.q).reshape(-1, blocks.q, G, H // G, K)
    k, v = (jnp.moveaxis(filled(x, blocks.k).reshape(-1, blocks.k, G, K), 1, 2) for x in (k_BSGK, v_BSGK))
    return jnp.moveaxis(q, 1, 3).reshape(-1, G, H // G * blocks.q, K), k, v


def _given_back(out: jax.Array, lse: jax.Array, shape: tuple[int, ...], blocks: Blocks) -> tuple[jax.Array, jax.Array]:
    """`out [B, T, H, K], lse [B, T, H]` of `out [N, G, M, K], lse [N, G, M]`; `shape` is that of the queries."""
    (B, T, H, K), G = shape, out.shape[1]
    out = jnp.moveaxis(out.reshape(-1, G, H // G, blocks.q, K), 3, 1).reshape(B, -1, H, K)[:, :T]
    return out, jnp.moveaxis(lse.reshape(-1, G, H // G, blocks.q), 3, 1).reshape(B, -1, H)[:, :T]


def _alike(x: jax.Array, *others: Any) -> jax.Array:
    """`x`, varying over every mesh axis that one of `others` varies over too.

    Inside shard_map the state of a loop must vary like what is added to it, and a cotangent like its array. A choice
    that depends on all, and that the compiler drops, says so in every version of JAX.
    """
    firsts = (leaf[(0,) * leaf.ndim] for leaf in jax.tree.leaves(others))
    never = functools.reduce(jnp.logical_or, (first == 0 for first in firsts)) & False
    return jnp.where(never, jnp.zeros((), x.dtype), x)


def _at(x: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, i, axis=0, keepdims=False)


def _put(x: jax.Array, new: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x, new, i, axis=0)


def _visible(plan: Plan, i: jax.Array, j: jax.Array) -> jax.Array:
    """The rule for a block of queries and one of keys, `[q_block, k_block]` bool."""
    q_block, k_block = plan.blocks
    start, stop, island = (
        jax.lax.dynamic_slice_in_dim(x, i * q_block, q_block)[:, None] for x in (plan.start, plan.stop, plan.island)
    )
    key_island = jax.lax.dynamic_slice_in_dim(plan.key_island, j * k_block, k_block)[None, :]
    index = (_at(plan.base, j) + jnp.arange(k_block, dtype=jnp.int32))[None, :]
    return (start <= index) & (index < stop) & ((key_island == 0) | (key_island == island))


def _logits(
    q_GMK: jax.Array, k_GCK: jax.Array, plan: Plan, entry: jax.Array, scale: float, soft_cap: float | None
) -> tuple[jax.Array, jax.Array | None]:
    """The logits `[G, M, C]` of one entry, -inf where nothing is seen, and with a soft cap their tanh."""
    i, j, klass = unpacked(entry)
    logits = jnp.einsum("gmk,gck->gmc", q_GMK, k_GCK, preferred_element_type=jnp.float32) * scale
    bent = None
    if soft_cap is not None:
        bent = jnp.tanh(logits / soft_cap)
        logits = soft_cap * bent

    def masked(logits: jax.Array) -> jax.Array:
        by_head = logits.reshape(logits.shape[0], -1, *plan.blocks)
        return jnp.where(_visible(plan, i, j)[None, None], by_head, -jnp.inf).reshape(logits.shape)

    return jax.lax.cond(klass == FULL, lambda logits: logits, masked, logits), bent


Options = tuple[float, float | None]
"""Scale and soft cap."""


def _solved(
    options: Options,
    q_NGMK: jax.Array,
    k_JGCK: jax.Array,
    v_JGCK: jax.Array,
    sinks_GR: jax.Array | None,
    plan: Plan,
) -> tuple[jax.Array, jax.Array]:
    """`(out [N, G, M, K], lse [N, G, M])`."""
    return _forward(options, q_NGMK, k_JGCK, v_JGCK, sinks_GR, plan)[0]


def _rows(sinks_GR: jax.Array, like_NGM: jax.Array) -> jax.Array:
    """The sink of each row of each block, `[N, G, M]`."""
    N, G, M = like_NGM.shape
    R = sinks_GR.shape[1]
    return jnp.broadcast_to(sinks_GR[None, :, :, None], (N, G, R, M // R)).reshape(N, G, M)


def _forward(
    options: Options,
    q_NGMK: jax.Array,
    k_JGCK: jax.Array,
    v_JGCK: jax.Array,
    sinks_GR: jax.Array | None,
    plan: Plan,
    _: None = None,
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    """One pass over the entries: each adds to the sums of its block of queries, which stand in arrays of O(T)."""
    scale, soft_cap = options

    def added(state: tuple[jax.Array, ...], entry: jax.Array) -> tuple[jax.Array, ...]:
        i, j, _ = unpacked(entry)
        out, highest, total = state
        logits, _ = _logits(_at(q_NGMK, i), _at(k_JGCK, j), plan, entry, scale, soft_cap)
        new = jnp.maximum(highest, jnp.max(logits, axis=-1))
        weight, shrink = jnp.exp(logits - new[..., None]), jnp.exp(highest - new)
        total = total * shrink + jnp.sum(weight, axis=-1)
        v = _at(v_JGCK, j)
        part = jnp.einsum("gmc,gck->gmk", weight.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return out * shrink[..., None] + part, new, total

    def step(n: jax.Array, states: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        entry = _at(plan.by_query, n)
        i, _, klass = unpacked(entry)
        old = tuple(_at(x, i) for x in states)
        new = jax.lax.cond(klass == EMPTY, lambda old: old, lambda old: added(old, entry), old)
        return tuple(_put(x, y, i) for x, y in zip(states, new, strict=True))

    zeros = jnp.zeros(q_NGMK.shape[:3], jnp.float32)
    highest, total = zeros + LOWEST, zeros
    if sinks_GR is not None:
        sink = _rows(sinks_GR, zeros)
        highest = jnp.maximum(sink, LOWEST)
        total = jnp.exp(sink - highest)
    states = tuple(_alike(x, q_NGMK) for x in (jnp.zeros(q_NGMK.shape, jnp.float32), highest, total))
    out, highest, total = jax.lax.fori_loop(0, plan.count_by_query[0], step, states)
    empty = total == 0.0
    total = jnp.where(empty, 1.0, total)
    out = (out / total[..., None]).astype(v_JGCK.dtype)
    out, lse = kept(out, jnp.where(empty, -jnp.inf, highest + jnp.log(total)))
    return (out, lse), (q_NGMK, k_JGCK, v_JGCK, sinks_GR, plan, out, lse)


def _backward(options: Options, residuals: Any, cotangents: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    """One pass over the entries again, five products each (arXiv 2205.14135, algorithm 4)."""
    scale, soft_cap = options
    q_NGMK, k_JGCK, v_JGCK, sinks_GR, plan, out, lse = residuals
    d_out, d_lse = cotangents
    blind = jnp.isneginf(lse)
    # A probability's logit moves out, and lse by the probability itself: both take part in every logit's gradient.
    common = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - d_lse
    common, lse = jnp.where(blind, 0.0, common), jnp.where(blind, 0.0, lse)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def parts(entry: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        i, j, _ = unpacked(entry)
        q, k, v, d = _at(q_NGMK, i), _at(k_JGCK, j), _at(v_JGCK, j), _at(d_out, i)
        logits, bent = _logits(q, k, plan, entry, scale, soft_cap)
        weight = jnp.exp(logits - _at(lse, i)[..., None])
        d_logits = weight * (product("gmk,gck->gmc", d, v) - _at(common, i)[..., None]) * scale
        if bent is not None:
            d_logits = d_logits * (1.0 - bent * bent)
        d_logits = d_logits.astype(q.dtype)
        d_v = product("gmc,gmk->gck", weight.astype(v.dtype), d)
        return product("gmc,gck->gmk", d_logits, k), product("gmc,gmk->gck", d_logits, q), d_v

    def nothing(entry: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        d_q, d_k, d_v = (_alike(jnp.zeros(x.shape[1:], jnp.float32), x) for x in (q_NGMK, k_JGCK, v_JGCK))
        return d_q, d_k, d_v

    def step(n: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        entry = _at(plan.by_query, n)
        i, j, klass = unpacked(entry)
        new = jax.lax.cond(klass == EMPTY, nothing, parts, entry)
        return tuple(_put(x, _at(x, at) + y, at) for x, y, at in zip(sums, new, (i, j, j), strict=True))

    sums = tuple(_alike(jnp.zeros(x.shape, jnp.float32), x) for x in (q_NGMK, k_JGCK, v_JGCK))
    d_q, d_k, d_v = jax.lax.fori_loop(0, plan.count_by_query[0], step, sums)
    d_sinks = None
    if sinks_GR is not None:
        by_head = (jnp.exp(_rows(sinks_GR, lse) - lse) * common).reshape(*lse.shape[:2], sinks_GR.shape[1], -1)
        d_sinks = -jnp.sum(by_head, axis=(0, 3))
    return d_q.astype(q_NGMK.dtype), d_k.astype(k_JGCK.dtype), d_v.astype(v_JGCK.dtype), d_sinks, None


_attention = jax.custom_vjp(_solved, nondiff_argnums=(0,))
_attention.defvjp(_forward, _backward)
