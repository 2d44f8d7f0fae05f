"""Next-token prediction: cross-entropy of the next id, weighted by the grammar, with z-loss."""

import jax
import jax.numpy as jnp

from mmgpt.core.config import ConfigError
from mmgpt.core.stream import MODALITIES, Batch
from mmgpt.models.decoder import Decoder
from mmgpt.objectives.objective import Loss, ObjectiveConfig
from mmgpt.tokens.vocabulary import Vocabulary


class NextToken:
    class Config(ObjectiveConfig):
        """`vocab` counts the ids in use: padded rows above it leave the softmax; 0 is filled in from the grammar.

        `z_loss` weighs log(Z)^2, which keeps logits from drifting (arXiv 2202.08906; Chameleon uses 1e-5).
        """

        vocab: int = 0
        z_loss: float = 1e-5

        def fit(self, vocabulary: Vocabulary) -> "NextToken.Config":
            """The config with the vocabulary's number of ids, unless it names its own."""
            return self if self.vocab else self.replace(vocab=vocabulary.used)

        def build(self) -> "NextToken":
            if self.vocab <= 0:
                raise ConfigError("objective.vocab is 0: give the grammar's number of ids.")
            return NextToken(self)

    def __init__(self, c: "NextToken.Config"):
        self.vocab = c.vocab
        self.coefficients = {"next_token": 1.0, "z_loss": c.z_loss}

    def corrupt(self, key: jax.Array, batch: Batch) -> Batch:
        return batch

    def loss(self, model: Decoder, batch: Batch, key: jax.Array | None) -> Loss:
        """Terms "next_token" and "z_loss"; metrics: loss and accuracy of each modality, unweighted per token."""
        stream = batch.streams["tokens"]
        logits = model(batch, key=key)
        column = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, None, :]
        logits = jnp.where(column < self.vocab, logits, -1e30)
        highest = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
        log_z = jnp.log(jnp.sum(jnp.exp(logits - highest[..., None]), axis=-1)) + highest
        # Elementwise, so that it also works where the vocabulary is sharded; a gather would not.
        picked = jnp.sum(jnp.where(column == stream.target[..., None], logits, 0.0), axis=-1)
        cross_entropy = log_z - picked
        weight = stream.weight
        total = jnp.sum(weight)
        terms = {
            "next_token": (jnp.sum(cross_entropy * weight), total),
            "z_loss": (jnp.sum(jnp.square(log_z) * weight), total),
        }
        right = (picked >= highest).astype(jnp.float32)
        metrics = {}
        for number, name in enumerate(MODALITIES[:3]):
            counted = ((weight > 0) & (stream.modality == number)).astype(jnp.float32)
            count = jnp.sum(counted)
            metrics[f"loss/{name}"] = (jnp.sum(cross_entropy * counted), count)
            metrics[f"accuracy/{name}"] = (jnp.sum(right * counted), count)
        return Loss(terms, metrics)
