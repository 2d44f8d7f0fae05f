"""The specification of attention over the visibility rule, in float32 and O(T S) memory."""

import jax
import jax.numpy as jnp

from mmgpt.core.stream import Visibility


def visible(visibility: Visibility) -> jax.Array:
    """The rule written out: `[B, T, S]` bool, the only T x S mask in the project."""
    index = visibility.index[:, None, :]
    inside = (visibility.start[:, :, None] <= index) & (index < visibility.stop[:, :, None])
    island = visibility.key_island[:, None, :]
    return inside & ((island == 0) | ((island > 0) & (island == visibility.island[:, :, None])))


def attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    visibility: Visibility,
    *,
    scale: float,
    soft_cap: float | None,
    sinks_H: jax.Array | None,
    dropout: float,
    key: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """`(out [B, T, H, K], lse [B, T, H] float32)`; a query that sees nothing yields zeros, and lse -inf or its sink."""
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    S, R = k_BSGK.shape[1], H // G
    # Heads before positions: the two products are then plain batched matmuls, whose large sides nothing transposes.
    q_BGMK = jnp.moveaxis(q_BTHK.reshape(B, T, G, R, K), 1, 3).reshape(B, G, R * T, K)
    k_BGSK, v_BGSK = jnp.moveaxis(k_BSGK, 1, 2), jnp.moveaxis(v_BSGK, 1, 2)
    logits = jnp.einsum("bgmk,bgsk->bgms", q_BGMK, k_BGSK, preferred_element_type=jnp.float32)
    logits = logits.reshape(B, G, R, T, S) * scale
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    # Behind a barrier the mask is made once; XLA would work the rule out again in every pass over [T, S].
    bias = jax.lax.optimization_barrier(jnp.where(visible(visibility), 0.0, -jnp.inf))
    logits = logits + bias[:, None, None]
    highest = jnp.max(logits, axis=-1, keepdims=True)
    sink = None if sinks_H is None else sinks_H.astype(jnp.float32).reshape(1, G, H // G, 1, 1)
    if sink is not None:
        highest = jnp.maximum(highest, sink)
    highest = jax.lax.stop_gradient(jnp.where(jnp.isfinite(highest), highest, 0.0))
    weight = jnp.exp(logits - highest)
    total = jnp.sum(weight, axis=-1, keepdims=True)
    if sink is not None:
        total = total + jnp.exp(sink - highest)
    empty = total == 0.0
    total = jnp.where(empty, 1.0, total)
    lse = jnp.where(empty, -jnp.inf, jnp.log(total) + highest)[..., 0]
    if key is not None and dropout > 0.0:
        weight = jnp.where(jax.random.bernoulli(key, 1.0 - dropout, weight.shape), weight / (1.0 - dropout), 0.0)
    # Dividing the output and not the weights saves two passes over [T, S], forward and backward.
    weight = weight.astype(v_BSGK.dtype).reshape(B, G, R * T, S)
    out = jnp.einsum("bgms,bgsk->bgmk", weight, v_BGSK, preferred_element_type=jnp.float32)
    out = (out.reshape(B, G, R, T, K) / total).astype(v_BSGK.dtype)
    return jnp.moveaxis(out, 3, 1).reshape(B, T, H, K), jnp.moveaxis(lse, -1, 1).reshape(B, T, H)
