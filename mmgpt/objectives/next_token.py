"""Next-token prediction: cross-entropy of the next id, weighted by the grammar, with z-loss."""

import jax
import jax.numpy as jnp

from mmgpt.core.config import ConfigError
from mmgpt.core.stream import MODALITIES, Batch
from mmgpt.kernels.cross_entropy.api import CHUNK_BYTES, cross_entropy
from mmgpt.models.decoder import Decoder
from mmgpt.objectives.objective import Loss, ObjectiveConfig
from mmgpt.tokens.vocabulary import Vocabulary


class NextToken:
    class Config(ObjectiveConfig):
        """`vocab` counts the ids in use: padded rows above it leave the softmax; 0 is filled in from the grammar.

        `z_loss` weighs log(Z)^2, which keeps logits from drifting (arXiv 2202.08906; Chameleon uses 1e-5).
        `chunk_bytes` is the memory for the logits of a chunk of positions: those of all are never there at once.
        """

        vocab: int = 0
        z_loss: float = 1e-5
        chunk_bytes: int = CHUNK_BYTES

        def fit(self, vocabulary: Vocabulary) -> "NextToken.Config":
            """The config with the vocabulary's number of ids, unless it names its own."""
            return self if self.vocab else self.replace(vocab=vocabulary.used)

        def build(self) -> "NextToken":
            if self.vocab <= 0:
                raise ConfigError("objective.vocab is 0: give the grammar's number of ids.")
            if self.chunk_bytes < 1:
                raise ConfigError(f"objective.chunk_bytes is {self.chunk_bytes}; give 1 or more, as {CHUNK_BYTES}.")
            return NextToken(self)

    def __init__(self, c: "NextToken.Config"):
        self.config = c
        self.coefficients = {"next_token": 1.0}

    def corrupt(self, key: jax.Array, batch: Batch) -> Batch:
        return batch

    def loss(self, model: Decoder, batch: Batch, key: jax.Array | None) -> Loss:
        """Term "next_token", z-loss included; metrics: that alone, loss and accuracy of each modality by token."""
        stream = batch.streams["tokens"]
        weight, (projection, rows) = stream.weight, model.projection
        total, scores = cross_entropy(
            model.hidden(batch, key=key),
            projection[...],
            stream.target,
            weight,
            used=self.config.vocab,
            z_loss=self.config.z_loss,
            rows=rows,
            chunk_bytes=self.config.chunk_bytes,
        )
        weights = jnp.sum(weight)
        metrics = {"z_loss": (jnp.sum(self.config.z_loss * jnp.square(scores.log_z) * weight), weights)}
        right = scores.right.astype(jnp.float32)
        for number, name in enumerate(MODALITIES[:3]):
            counted = ((weight > 0) & (stream.modality == number)).astype(jnp.float32)
            count = jnp.sum(counted)
            metrics[f"loss/{name}"] = (jnp.sum(scores.cross_entropy * counted), count)
            metrics[f"accuracy/{name}"] = (jnp.sum(right * counted), count)
        return Loss({"next_token": (total, weights)}, metrics)
