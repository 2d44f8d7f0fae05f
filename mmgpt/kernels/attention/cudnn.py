"""Causal attention by cuDNN, through what JAX has public."""

import functools

import jax
import jax.numpy as jnp

MOST_HEAD_DIM = 128


def fits(q_BTHK: jax.Array, k_BSGK: jax.Array, soft_cap: float | None, sinks_H: jax.Array | None) -> bool:
    """Whether cuDNN has kernels for these arrays and options, where rows are causal and hold one document each."""
    T, K = q_BTHK.shape[1], q_BTHK.shape[3]
    plain = soft_cap is None and sinks_H is None and T == k_BSGK.shape[1]
    return plain and K % 8 == 0 and K <= MOST_HEAD_DIM and q_BTHK.dtype in (jnp.bfloat16, jnp.float16)


def attention(q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, scale: float) -> tuple[jax.Array, jax.Array]:
    """`(out [B, T, H, K], lse [B, T, H] float32)`, not to be differentiated.

    JAX rounds the lse that it returns to the dtype of the output, too coarse to join parts of attention or to make
    probabilities again. What it keeps for the gradient is not rounded: that is taken here.
    """
    out, back = jax.vjp(functools.partial(_causal, scale), q_BTHK, k_BTGK, v_BTGK)
    B, T, H, _ = q_BTHK.shape
    kept = [x for x in jax.tree.leaves(back) if x.dtype == jnp.float32 and x.shape == (B, H, T)]
    if len(kept) != 1:
        raise NotImplementedError(f"attention: JAX {jax.__version__} keeps no lse of cuDNN; take 'xla'.")
    return out, kept[0].swapaxes(1, 2)


def gradients(
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, do_BTHK: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`dq, dk, dv`, of the output alone.

    Runs the forward pass again: JAX has the backward pass only together with what its own forward pass kept.
    """
    _, back = jax.vjp(functools.partial(_causal, scale), q_BTHK, k_BTGK, v_BTGK)
    dq, dk, dv = back(do_BTHK)
    return dq, dk, dv


def _causal(scale: float, q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q_BTHK, k_BTGK, v_BTGK, scale=scale, is_causal=True, implementation="cudnn")
