"""What an objective is: corrupt -> forward -> read -> loss, with every loss a (sum, weight) pair."""

import abc
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp

from mmgpt.core import config
from mmgpt.core.stream import Batch
from mmgpt.tokens.vocabulary import Vocabulary

SumWeight = tuple[jax.Array, jax.Array]


class Loss(NamedTuple):
    """`terms` and `metrics` map a name to (sum, weight); `variables` is the model's new non-trained state, if any."""

    terms: dict[str, SumWeight]
    metrics: dict[str, SumWeight]
    variables: dict[str, Any] | None = None


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

    @abc.abstractmethod
    def build(self) -> Objective:
        """The objective."""


def mean(pair: SumWeight) -> jax.Array:
    """sum / weight, and 0 where the weight is 0."""
    total, weight = pair
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1.0), 0.0)


def total(loss: Loss, coefficients: dict[str, float]) -> jax.Array:
    """The number that is differentiated: the sum over terms of coefficient x sum / weight."""
    parts = [coefficients[name] * mean(pair) for name, pair in loss.terms.items()]
    return jnp.sum(jnp.stack(parts))
