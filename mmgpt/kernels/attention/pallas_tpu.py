"""Attention on a TPU over the blocks of a plan: layouts, the choice of kernel, and the gradient.

The kernels are in `pallas_tpu_forward.py` and `pallas_tpu_backward.py`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmgpt.dist.mesh import device_kind
from mmgpt.kernels.attention import ring
from mmgpt.kernels.attention.logits import LOG2E, UNSEEN, Options, filled, kept, settled
from mmgpt.kernels.attention.pallas_tpu_backward import backward, output_sums, turned_back
from mmgpt.kernels.attention.pallas_tpu_forward import LANES, forward
from mmgpt.kernels.attention.plan import LAST_ENTRIES, MOST_ENTRIES, MOST_SIDE, Blocks, Plan, side
from mmgpt.kernels.attention.ring import Ring, Steps

STEP_ROWS = 8192
"""Queries of all heads in one step: their float32 sums take 4 MB of VMEM at a head dim of 128."""
MOST_HEAD_DIM = 256
SMALL_SIDE, SMALL_UNITS = 512, ("TPU v4", "TPU v5")
"""Blocks that keep matrix units of 128 x 128 busy, and the TPUs that have such."""


def blocks(T: int, S: int, R: int, K: int, rows: int = 1, kind: str | None = None) -> Blocks:
    """Blocks for rows of T queries and S keys, R query heads of K numbers to a key head, on this or some `kind` of TPU.

    Small ones visit less that nobody sees, large ones keep the matrix units busy (docs/attention.md): 512 a side for
    those of a v4 or v5, 1,024 for larger ones. Short rows get smaller ones. A list of more than 64 KB gets larger ones,
    up to 1,024 a side, or as many queries as fit; one that is then beyond 256 KB more keys still.
    """
    kind = device_kind() if kind is None else kind
    most = SMALL_SIDE if kind.startswith(SMALL_UNITS) and K <= LANES else MOST_SIDE
    room = side(T, max(LANES, min(MOST_SIDE, STEP_ROWS * LANES // (R * max(K, LANES)))))
    q, k = min(room, most), side(S, most)

    def entries() -> int:
        return rows * -(-T // q) * -(-S // k)

    while entries() > MOST_ENTRIES and min(q, k) < MOST_SIDE and (q < room or k < MOST_SIDE):
        if q < room and (q <= k or k == MOST_SIDE):
            q *= 2
        else:
            k *= 2
    while entries() > LAST_ENTRIES:
        k *= 2
    return Blocks(q, k)


def side_by_side(head_dim: int) -> bool:
    """Whether heads may lie side by side in outputs: only those that fill whole registers can be written so."""
    return head_dim % LANES == 0


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
    `interpret`: what Pallas takes, to run it without a TPU. A Ring takes no sinks.
    Raises ValueError for head dims beyond 256, and for blocks that no TPU takes.
    """
    B, T, H, K = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    if K > MOST_HEAD_DIM:
        raise ValueError(f"attention: 'pallas_tpu' has head dims up to {MOST_HEAD_DIM} and got {K}; take 'xla'.")
    plans = plan.plans if isinstance(plan, Ring) else plan
    plans.check(B, T, S)
    q_block, k_block = plans.blocks
    if q_block % LANES or k_block % LANES:
        raise ValueError(f"attention: 'pallas_tpu' has blocks of multiples of {LANES} and got {plans.blocks}.")
    R = H // G
    options = Options(soft_cap=soft_cap, sinks=sinks_H is not None)
    options, bound = settled(logit_bound, options)
    flat = side_by_side(K) and not isinstance(plan, Ring)
    static = Static(options, flat, interpret)
    factor = jnp.float32(scale * options.query_factor)
    q_GRNK = filled((q_BTHK * factor).astype(q_BTHK.dtype), q_block).reshape(-1, G, R, K).transpose(1, 2, 0, 3)
    k_GMK, v_GMK = (filled(x, k_block).reshape(-1, G, K).transpose(1, 0, 2) for x in (k_BSGK, v_BSGK))
    sinks_GR = None if sinks_H is None else sinks_H.astype(jnp.float32).reshape(G, R)
    if isinstance(plan, Ring):
        out, lse = ring.attention(Steps(_solve, gradients, static), q_GRNK, k_GMK, v_GMK, plan, bound)
    else:
        solved: Any = _attention(static, q_GRNK, k_GMK, v_GMK, sinks_GR, plan, bound)
        out, lse = solved
    out = out if flat else out.transpose(2, 0, 1, 3)
    out = out.reshape(B, -1, H * K)[:, :T].reshape(B, T, H, K)
    return out, lse.reshape(H, -1).T.reshape(B, -1, H)[:, :T]


class Static(NamedTuple):
    """What the kernels are compiled for; `interpret` is what Pallas takes.

    `flat`: outputs, and their gradients, are `[N, H * K]`, as projections have them, and not `[G, R, N, K]`.
    """

    options: Options
    flat: bool
    interpret: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: Static, q, k, v, sinks, plan: Plan, bound) -> tuple[jax.Array, jax.Array]:
    return _solve(static, q, k, v, sinks, plan, bound)[0]


def _solve(static: Static, q, k, v, sinks, plan: Plan, bound) -> Any:
    """`bound`: whether logits are bounded, as the step runs; None where the options say it."""
    start = jnp.zeros(q.shape[:2], jnp.float32) if sinks is None else sinks

    # The kernel chooses, and not a conditional around it, behind which the compiler could not move communication.
    options = static.options if bound is None else static.options._replace(bounded=None)
    out, lse = forward(q, k, v, start, plan, options, bound, flat=static.flat, interpret=static.interpret)
    out, lse = kept(out, lse[:, :, 0])
    return (out, lse), (q, k, v, sinks, plan, out, lse)


def gradients(static: Static, saved: Any, cotangents: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    """Those of `q [G, R, N, K]`, `k, v [G, M, K]` and `sinks [G, R]` for those of `out` and `lse [G, R, N]`.

    `saved`: q, k, v, sinks, the plan, out and lse; these two may be over more keys than k.
    """
    q, k, v, sinks, plan, out, lse = saved
    do, dlse = cotangents
    do, options, interpret = do.astype(v.dtype), static.options, static.interpret
    blind = jnp.isneginf(lse)
    if static.flat:
        sums = output_sums(do, out, lse.shape[0], lse.shape[1], plan.blocks.q, interpret)[:, :, 0]
    else:
        sums = jnp.sum(do.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    # A probability's logit moves out, and lse by the probability itself; who sees nothing has neither.
    di = jnp.where(blind, 0.0, sums - dlse)
    log2_sum = jnp.where(blind, UNSEEN, lse * LOG2E)
    dq, dk, dv = backward(q, k, v, do, log2_sum[:, :, None], di[:, :, None], plan, options, interpret)
    dq = turned_back(dq, plan, 1.0 / options.query_factor, q.dtype, interpret)
    # A sink's weight in the sum takes from all outputs, and adds to lse.
    weight = None if sinks is None else jnp.exp(sinks[:, :, None] - jnp.where(blind, 0.0, lse))
    dsinks = None if weight is None else -jnp.sum(weight * di, axis=2)
    return dq, dk, dv, dsinks, None, None


_attention.defvjp(_solve, gradients)
