"""Models: one file per architecture. What their configs have in common is here."""

import abc
from typing import Any, Self

from flax import nnx

from mmgpt.core import config
from mmgpt.core.stream import Batch
from mmgpt.tokens.vocabulary import Vocabulary


class ModelConfig(config.Config, abc.ABC):
    """Config of a model."""

    def fit(self, vocabulary: Vocabulary) -> Self:
        """The config with the sizes that a vocabulary sets; a model that reads no ids stays as it is."""
        return self

    @abc.abstractmethod
    def build(self, rngs: nnx.Rngs) -> Any:
        """The module with fresh parameters; runs inside `jax.set_mesh`."""

    @abc.abstractmethod
    def step_flops(self, batch: Batch) -> float:
        """Matmul operations of one training step on such a batch, forward and backward."""


class VisionConfig(ModelConfig):
    """Config of an image tokenizer; its module has `encode` and `decode`.

    With `temporal` above 1 the module also has `encode_clip` and `decode_clip`, and the parts they are made of.
    """

    @property
    @abc.abstractmethod
    def patch(self) -> int:
        """Pixels a side of a place."""

    @property
    def temporal(self) -> int:
        """Frames of a clip that share a place's codes."""
        return 1

    @property
    def past(self) -> int:
        """How many codes before its own a frame can depend on, and a code on the frames of."""
        return 0

    @property
    @abc.abstractmethod
    def codebooks(self) -> tuple[int, ...]:
        """Sizes of the codebooks in the order in which a place lists its codes."""

    @property
    def blanks(self) -> bool:
        """Whether a place whose first code is 0 holds nothing: its other codes are 0 too and need no ids."""
        return False
