"""Attention over the visibility rule: one signature, several implementations."""

from typing import Literal

import jax

from mmgpt.core.stream import Visibility
from mmgpt.kernels.attention import reference

Implementation = Literal["reference"]


def attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    visibility: Visibility,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    logit_bound: float | None = None,
    dropout: float = 0.0,
    key: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Scaled dot-product attention of the keys each query sees.

    H query heads share G key heads in groups of H / G. `scale` defaults to K ** -0.5; `soft_cap` bounds the logits
    by tanh; `sinks [H]` adds one logit per head to the softmax's sum; `logit_bound` promises |logit| <= bound, which
    a kernel may use in place of the running maximum. `dropout` on the probabilities needs `key`.

    Returns `out [B, T, H, K]` in v's dtype and `lse [B, T, H]` float32, the log of the softmax's sum.
    A named `implementation` never falls back to another; None chooses.
    """
    H, G = q_BTHK.shape[2], k_BSGK.shape[2]
    if H % G:
        raise ValueError(
            f"attention: {H} query heads do not divide into {G} key heads; make heads a multiple of kv_heads."
        )
    if implementation not in (None, "reference"):
        raise ValueError(f"attention: unknown implementation {implementation!r}; there is 'reference'.")
    return reference.attention(
        q_BTHK,
        k_BSGK,
        v_BSGK,
        visibility,
        scale=float(q_BTHK.shape[-1] ** -0.5) if scale is None else scale,
        soft_cap=soft_cap,
        sinks_H=sinks,
        dropout=dropout,
        key=key,
    )
