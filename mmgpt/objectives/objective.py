"""What an objective is: corrupt -> forward -> read -> loss, with every loss a (sum, weight) pair."""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
from flax import nnx

from mmgpt.core import config
from mmgpt.core.stream import Batch
from mmgpt.models import ModelConfig
from mmgpt.nn.param import act
from mmgpt.tokens.vocabulary import Vocabulary

SumWeight = tuple[jax.Array, jax.Array]


class Loss(NamedTuple):
    """`terms` and `metrics` map a name to (sum, weight); `variables` is the model's new non-trained state, if any.

    `counts` maps the name of a codebook to how often each code was used, `[codes]`. All but `variables` add up over
    batches.
    """

    terms: dict[str, SumWeight]
    metrics: dict[str, SumWeight]
    variables: dict[str, Any] | None = None
    counts: dict[str, jax.Array] = {}  # noqa: RUF012 - a NamedTuple's default; nothing writes to it

    def figures(self) -> dict[str, SumWeight]:
        """Everything to tell as (sum, weight); of a codebook the share of its codes in use, and their perplexity."""
        found = {**self.terms, **self.metrics}
        for name, count in self.counts.items():
            total = jnp.sum(count)
            seen = jnp.where(total > 0, 1.0, 0.0)
            share = count / jnp.maximum(total, 1.0)
            entropy = -jnp.sum(share * jnp.log(jnp.maximum(share, 1e-12)))
            found[f"use/{name}"] = jnp.sum(jnp.where(count > 0, 1.0, 0.0)) * seen, seen * count.shape[0]
            found[f"perplexity/{name}"] = jnp.exp(entropy) * seen, seen
        return found


class Objective(Protocol):
    """Built from its Config. `coefficients` weighs the terms in the total."""

    coefficients: dict[str, float]

    def corrupt(self, key: jax.Array, batch: Batch) -> Batch:
        """The batch as the model sees it, with the targets the loss reads."""
        ...

    def loss(self, model: Any, batch: Batch, key: jax.Array | None) -> Loss:
        """Forward pass and losses of a corrupted batch; no key means evaluation."""
        ...


class ObjectiveConfig(config.Config, abc.ABC):
    """Config of an objective."""

    def fit(self, vocabulary: Vocabulary) -> Self:
        """The config with the sizes that a vocabulary sets."""
        return self

    def trained(self, model: ModelConfig) -> Callable[[nnx.Rngs], Any]:
        """What makes the module that is trained: the model, which some objectives give parts that only training needs.

        Those are attributes of the module beside its own, so that the model's names are the same with and without.
        """
        return model.build

    @abc.abstractmethod
    def build(self) -> Objective:
        """The objective."""


def counted(code: jax.Array, weight: jax.Array, codes: int) -> jax.Array:
    """How often each code is used, `[codes]`, of codes and weights in three dimensions; weight 0 does not count."""
    code, weight = act(code, "codes height width"), act(weight, "codes height width")
    return jnp.zeros((codes,), jnp.float32).at[code].add(weight)


def mean(pair: SumWeight) -> jax.Array:
    """sum / weight, and 0 where the weight is 0."""
    total, weight = pair
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1.0), 0.0)


def total(loss: Loss, coefficients: dict[str, float]) -> jax.Array:
    """The number that is differentiated: the sum over terms of coefficient x sum / weight."""
    parts = [coefficients[name] * mean(pair) for name, pair in loss.terms.items()]
    return jnp.sum(jnp.stack(parts))
