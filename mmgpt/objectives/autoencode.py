"""Training an image tokenizer: reconstruction and commitment; the codebooks follow by moving averages."""

import jax
import jax.numpy as jnp

from mmgpt.core.stream import Batch
from mmgpt.models.patch_vq import PatchVQ
from mmgpt.nn.quantize import Quantized
from mmgpt.objectives.objective import Loss, ObjectiveConfig


class Autoencode:
    class Config(ObjectiveConfig):
        """Weight of the commitment term (arXiv 1711.00937: 0.25) and decay of the codebooks' averages."""

        commitment: float = 0.25
        decay: float = 0.99

        def build(self) -> "Autoencode":
            return Autoencode(self)

    def __init__(self, c: "Autoencode.Config"):
        self.decay = c.decay
        self.coefficients = {"reconstruction": 1.0, "commitment": c.commitment}

    def corrupt(self, key: jax.Array, batch: Batch) -> Batch:
        return batch

    def loss(self, model: PatchVQ, batch: Batch, key: jax.Array | None) -> Loss:
        """Terms "reconstruction" (mean squared error) and "commitment"; metrics: PSNR in dB, perplexity of the codes."""
        patches = model.patches(batch.streams["pixels"].feats)
        (structure, quantized), (colour, quantized_colour) = model.quantize(patches)
        drawn = model.draw(quantized.value, quantized_colour.value)
        error = jnp.sum(jnp.square(drawn - patches))
        count = jnp.asarray(patches.size, jnp.float32)
        one = jnp.ones((), jnp.float32)
        psnr = 10.0 * jnp.log10(4.0 * count / jnp.maximum(error, 1e-12))  # the range is 2, its square 4
        metrics = {
            "psnr": (psnr, one),
            "perplexity/structure": (_perplexity(quantized, model.config.structure), one),
            "perplexity/colour": (_perplexity(quantized_colour, model.config.colour), one),
        }
        commitment = quantized.commitment + quantized_colour.commitment
        terms = {"reconstruction": (error, count), "commitment": (commitment, one)}
        if key is None:
            return Loss(terms, metrics)
        first, second = jax.random.split(key)
        variables = {
            "structure": model.structure.follow(first, structure, quantized.code, self.decay),
            "colour": model.colour.follow(second, colour, quantized_colour.code, self.decay),
        }
        return Loss(terms, metrics, variables)


def _perplexity(quantized: Quantized, codes: int) -> jax.Array:
    """exp of the entropy of the codes in use: how many of them carry the batch."""
    share = jnp.zeros((codes,), jnp.float32).at[quantized.code].add(1.0 / quantized.code.shape[0])
    return jnp.exp(-jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.maximum(share, 1e-12)), 0.0)))
