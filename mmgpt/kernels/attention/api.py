"""Attention over the visibility rule: one signature, several implementations."""

import typing
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mmgpt.core.stream import Visibility
from mmgpt.dist.mesh import platform
from mmgpt.kernels.attention import pallas_gpu, pallas_tpu, plan, reference, xla
from mmgpt.kernels.attention import ring as rings
from mmgpt.kernels.attention.ring import Ring

Implementation = Literal["reference", "xla", "pallas_tpu", "pallas_gpu"]

DENSE_PAIRS = 1024 * 1024
"""Up to so many pairs of query and key None chooses the specification itself, whose T x S then is a few MB a head.

Small runs keep its numbers. Speed alone would draw the line lower: on two CPU cores a step's attention over 1,024
packed positions takes xla 27 to 37 ms and the reference 90 ms (8 heads over 2, head_dim 64, float32).
"""


def attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    visibility: Visibility | plan.Plan | Ring,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    logit_bound: float | jax.Array | None = None,
    dropout: float = 0.0,
    key: jax.Array | None = None,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Scaled dot-product attention of the keys each query sees.

    H query heads share G key heads in groups of H / G. Keys lie in the order of their indices, or whole blocks of them
    do (see `plan_for`). `visibility` may be what that made of one; with a Ring, k and v are this device's part.

    `scale` defaults to K ** -0.5; `soft_cap` bounds the logits by tanh; `sinks [H]` adds one logit per head to the
    softmax's sum; `logit_bound` promises |logit| <= bound, which a kernel may use in place of the running maximum.
    `dropout` on the probabilities needs `key`, and only the reference has it.

    Returns `out [B, T, H, K]` in v's dtype and `lse [B, T, H]` float32, the log of the softmax's sum.
    A named `implementation` never falls back to another; None chooses. `interpret` (of Pallas) runs its kernels
    where their chip is not.
    """
    _check(q_BTHK, k_BSGK, v_BSGK, sinks)
    H, K, G = *q_BTHK.shape[2:], k_BSGK.shape[2]
    dropped = dropout > 0.0 and key is not None
    known = implementation
    if not isinstance(visibility, Visibility) and known is None:  # whoever made it has chosen already
        known = _sparse(K)
    name = chosen((q_BTHK.shape[1], k_BSGK.shape[1]), H, G, K, known, dropped)
    scale = float(K**-0.5) if scale is None else scale
    if name == "reference":
        if not isinstance(visibility, Visibility):
            raise ValueError("attention: 'reference' takes a Visibility and got a Plan; give it what the plan is of.")
        terms = {"scale": scale, "soft_cap": soft_cap, "sinks_H": sinks, "dropout": dropout, "key": key}
        return reference.attention(q_BTHK, k_BSGK, v_BSGK, visibility, **terms)
    if isinstance(visibility, Visibility):
        shape = q_BTHK.shape[0], q_BTHK.shape[1], k_BSGK.shape[1]
        visibility = plan.make(visibility, _blocks(name, shape, H // G, K))
    own = None if isinstance(visibility, Ring) else sinks
    terms = {"scale": scale, "soft_cap": soft_cap, "sinks_H": own}
    if name == "xla":
        out, lse = xla.attention(q_BTHK, k_BSGK, v_BSGK, visibility, **terms)
    else:
        terms |= {"logit_bound": logit_bound, "interpret": interpret}
        kernels = pallas_tpu if name == "pallas_tpu" else pallas_gpu
        out, lse = kernels.attention(q_BTHK, k_BSGK, v_BSGK, visibility, **terms)
    if sinks is None or own is not None:
        return out, lse
    # A sink counts once, and not in each step of a ring: it is one more part to merge with, whose output is zero.
    total = jnp.logaddexp(lse, sinks.astype(jnp.float32)[None, None, :])
    return (out * jnp.exp(lse - total)[..., None]).astype(out.dtype), total


def plan_for(
    visibility: Visibility,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dropout: float = 0.0,
    implementation: Implementation | None = None,
    unit: int | None = None,
    ring: str | None = None,
) -> Visibility | plan.Plan | Ring:
    """What `attention` takes as `visibility`, made once for all layers that share it, where there is something to make.

    `heads`, `kv_heads` and `head_dim` are those of one device's arrays; `dropout` is what `attention` will get with a
    key. Inside shard_map the plan is of the device's own visibility. `unit`: the keys' indices are consecutive in whole
    units only, as `balance` lays them out. `ring`: a mesh axis, over whose devices keys then go round; the visibility
    has the keys of all of them. Raises ValueError as `attention` does.
    """
    T, S = visibility.start.shape[1], visibility.index.shape[1]
    if ring is not None:
        S //= jax.lax.axis_size(ring)
        implementation = implementation or _sparse(head_dim)
    name = chosen((T, S), heads, kv_heads, head_dim, implementation, dropout > 0.0)
    if name == "reference":
        return visibility
    blocks = _blocks(name, (visibility.start.shape[0], T, S), heads // kv_heads, head_dim, unit)
    return plan.make(visibility, blocks) if ring is None else rings.make(visibility, blocks, ring)


def _blocks(name: Implementation, shape: tuple[int, int, int], R: int, K: int, unit: int | None = None) -> plan.Blocks:
    """Blocks for `shape` (B, T, S)."""
    B, T, S = shape
    if name == "xla":
        return xla.blocks(T, S if unit is None else min(S, unit), R)
    found = pallas_tpu.blocks(T, S, R, K, B) if name == "pallas_tpu" else pallas_gpu.blocks(T, S, K)
    return found if unit is None else found._replace(k=min(found.k, unit))


def _sparse(head_dim: int) -> Implementation:
    """The implementation over blocks that is best where the program is to run."""
    kernels: dict[str, tuple[Implementation, int]] = {
        "tpu": ("pallas_tpu", pallas_tpu.MOST_HEAD_DIM),
        "gpu": ("pallas_gpu", pallas_gpu.MOST_HEAD_DIM),
    }
    name, most = kernels.get(platform(), ("xla", 0))
    return name if head_dim <= most else "xla"


def _check(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None) -> None:
    """Raises ValueError on shapes that do not fit together, which a kernel would read beyond an array's end."""
    rows, heads = q.shape[0], q.shape[2]
    if k.shape != v.shape or k.shape[0] != rows or k.shape[3] != q.shape[3] or 0 in (*q.shape, *k.shape):
        raise ValueError(
            f"attention: q {q.shape}, k {k.shape} and v {v.shape} do not fit together; they are [B, T, H, K] and twice "
            "[B, S, G, K], none of them empty."
        )
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"attention: sinks {sinks.shape} for {heads} query heads; give one number a head.")


def chosen(
    shape: tuple[int, int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    implementation: Implementation | None,
    dropped: bool,
) -> Implementation:
    """The implementation that `attention` takes for `shape` (T, S) of one device. Raises ValueError as it does."""
    if heads % kv_heads:
        raise ValueError(
            f"attention: {heads} query heads do not divide into {kv_heads} key heads; "
            "make heads a multiple of kv_heads."
        )
    known = typing.get_args(Implementation)
    if implementation not in (None, *known):
        there = " and ".join(map(repr, known))
        raise ValueError(f"attention: unknown implementation {implementation!r}; there are {there}.")
    if dropped and implementation not in (None, "reference"):
        raise ValueError(
            f"attention: {implementation!r} has no dropout; set dropout to 0, or take 'reference' with a Visibility."
        )
    if implementation is not None:
        return implementation
    # One query reads every key once: there is nothing to skip that is worth a loop.
    dense = dropped or shape[0] == 1 or shape[0] * shape[1] <= DENSE_PAIRS
    return "reference" if dense else _sparse(head_dim)
