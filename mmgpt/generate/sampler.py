"""Choosing the next id: temperature, top-k and top-p for text and for visual codes apart, and guidance."""

import math

import jax
import jax.numpy as jnp

from mmgpt.core import config


class Sampler(config.Config):
    """`temperature` 0 takes the likeliest id; `top_k` 0 and `top_p` 1 keep all."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < math.inf:
            raise config.ConfigError(f"temperature is {self.temperature}; give 0 (the likeliest id) or more.")
        if self.top_k < 0:
            raise config.ConfigError(f"top_k is {self.top_k}; give 0 (all ids) or more.")
        if not 0.0 < self.top_p <= 1.0:
            raise config.ConfigError(f"top_p is {self.top_p}; give more than 0 and at most 1 (all ids).")


def filtered(logits_BV: jax.Array, sampler: Sampler) -> jax.Array:
    """Logits over temperature, with what top-k and top-p leave out at -inf (arXiv 1904.09751)."""
    if sampler.temperature == 0.0:
        best = jnp.argmax(logits_BV, axis=-1, keepdims=True)
        column = jnp.arange(logits_BV.shape[-1])[None, :]
        return jnp.where(column == best, 0.0, -jnp.inf)
    logits = logits_BV / sampler.temperature
    if sampler.top_k > 0:
        least = jax.lax.top_k(logits, min(sampler.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if sampler.top_p < 1.0:
        ordered = -jnp.sort(-logits, axis=-1)
        before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
        least = jnp.min(jnp.where(before < sampler.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return logits


def guided(conditional_BV: jax.Array, unconditional_BV: jax.Array, scale: float) -> jax.Array:
    """Classifier-free guidance on log-probabilities: `u + scale (c - u)` (arXiv 2207.12598)."""
    c, u = jax.nn.log_softmax(conditional_BV, axis=-1), jax.nn.log_softmax(unconditional_BV, axis=-1)
    return u + scale * (c - u)
