"""What the next id may be: temperature, top-k and top-p for text and for visual codes apart, guidance, the grammar."""

import math

import jax
import jax.numpy as jnp

from mmgpt.core import config
from mmgpt.tokens.grammars.grammar import Automaton

LEAST_TEMPERATURE = 1e-6
"""Below it, logits over the temperature leave the range of float32."""
MOST_DRAFTED = 256
"""Ids that a pass drafts: it holds as many distributions, and far fewer are ever taken at once."""


class Sampler(config.Config):
    """`temperature` 0 takes the likeliest id; `top_k` 0 and `top_p` 1 keep all."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature != 0.0 and not LEAST_TEMPERATURE <= self.temperature < math.inf:
            raise config.ConfigError(
                f"temperature is {self.temperature}; give 0 (the likeliest id), or {LEAST_TEMPERATURE} or more."
            )
        if self.top_k < 0:
            raise config.ConfigError(f"top_k is {self.top_k}; give 0 (all ids) or more.")
        if not 0.0 < self.top_p <= 1.0:
            raise config.ConfigError(f"top_p is {self.top_p}; give more than 0 and at most 1 (all ids).")


class Sampling(config.Config):
    """How to sample: `room` new tokens at most; guidance acts inside media only.

    `guidance` 1 turns it off; above 1 it pushes away from the negative branch. An `image_guidance` other than 1 adds a
    third branch, which sees the prompt's pictures alone. A row also ends after the text id `stop` (-1: only at EOS).
    `jacobi` is the window of speculative Jacobi decoding: ids that are drafted and verified in one pass; 0 takes one id
    a pass.
    """

    room: int = 256
    guidance: float = 1.0
    image_guidance: float = 1.0
    text: Sampler = Sampler(temperature=0.0)
    image: Sampler = Sampler(temperature=1.0)
    seed: int = 0
    stop: int = -1
    jacobi: int = 0

    def __post_init__(self) -> None:
        for name in ("guidance", "image_guidance"):
            if not math.isfinite(getattr(self, name)):
                raise config.ConfigError(f"{name} is {getattr(self, name)}; give a number, 1 for none.")
        if self.room < 1:
            raise config.ConfigError(f"room is {self.room}; give the new tokens at most, 1 or more.")
        if not 0 <= self.jacobi <= MOST_DRAFTED:
            raise config.ConfigError(
                f"jacobi is {self.jacobi}; give the ids that one pass verifies, up to {MOST_DRAFTED}, or 0 for none."
            )

    @property
    def branches(self) -> int:
        """Rows that each prompt takes in a batch: itself, the negative branch, the prompt's pictures alone."""
        return 3 if self.image_guidance != 1.0 else 1 if self.guidance == 1.0 else 2

    @property
    def greedy(self) -> bool:
        """Whether only the likeliest ids are taken."""
        return self.text.temperature == self.image.temperature == 0.0


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


def guided(
    conditional_BV: jax.Array,
    unconditional_BV: jax.Array,
    scale: float,
    image_only_BV: jax.Array | None = None,
    image_scale: float = 1.0,
) -> jax.Array:
    """Classifier-free guidance on log-probabilities: `u + scale (c - u)` (arXiv 2207.12598).

    With a third branch `i` that sees the prompt's pictures alone: `u + image_scale (i - u) + scale (c - i)`
    (arXiv 2211.09800).
    """
    c, u = jax.nn.log_softmax(conditional_BV, axis=-1), jax.nn.log_softmax(unconditional_BV, axis=-1)
    if image_only_BV is None:
        return u + scale * (c - u)
    i = jax.nn.log_softmax(image_only_BV, axis=-1)
    return u + image_scale * (i - u) + scale * (c - i)


def permitted(automaton: Automaton, state_BK: jax.Array, room_B: jax.Array, stopped_B: jax.Array) -> jax.Array:
    """`[B, V] bool`: ids that the grammar lets come next in the `room` left; padding without room or once `stopped`."""
    allowed = automaton.allowed(state_BK, room_B)
    column = jnp.arange(allowed.shape[1])[None, :]
    return jnp.where((stopped_B | (room_B < 1))[:, None], column == automaton.pad, allowed)


def candidates(sampling: Sampling, logits_RV: jax.Array, permitted_BV: jax.Array, visual_B: jax.Array) -> jax.Array:
    """`[B, V]`: unnormalised log-probabilities of the next ids, -inf for what the grammar or a sampler leaves out.

    `logits [R, V]` hold the branches of guidance one after the other, each B rows.
    """
    visual_B1 = visual_B[:, None]
    branches = jnp.split(logits_RV[:, : permitted_BV.shape[1]], sampling.branches)
    logits = branches[0]
    if sampling.branches > 1:
        pushed = guided(branches[0], branches[1], sampling.guidance, *branches[2:], image_scale=sampling.image_guidance)
        logits = jnp.where(visual_B1, pushed, logits)
    logits = jnp.where(permitted_BV, logits, -jnp.inf)
    if sampling.image == sampling.text:
        return filtered(logits, sampling.text)
    return jnp.where(visual_B1, filtered(logits, sampling.image), filtered(logits, sampling.text))
