"""Training an image tokenizer: reconstruction and commitment; the codebooks follow by moving averages."""

import jax
import jax.numpy as jnp

from mmgpt.core.stream import Batch
from mmgpt.dist import axes as rules
from mmgpt.models.patch_vq import PatchVQ
from mmgpt.nn.param import act
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
        """Terms "reconstruction" (mean squared error) and "commitment"; metrics: PSNR in dB, the codes' perplexity."""
        stream = batch.streams["pixels"]
        patches = model.patches(stream.feats)
        N, P = patches.shape
        weight = jnp.broadcast_to(stream.weight, (stream.weight.shape[0], N // stream.weight.shape[0]))
        weight = weight.reshape(N, out_sharding=rules.spec("batch", rules.ACT))
        (structure, quantized), (colour, quantized_colour) = model.quantize(patches)
        drawn = model.draw(quantized.value, quantized_colour.value)
        error = jnp.sum(jnp.square(drawn - patches) * weight[:, None])
        seen = jnp.sum(weight)
        count, any_seen = seen * P, (seen > 0).astype(jnp.float32)
        # The range of a value is 2, its square 4.
        psnr = 10.0 * jnp.log10(4.0 * jnp.maximum(count, 1.0) / jnp.maximum(error, 1e-12))
        metrics = {
            "psnr": (psnr, any_seen),
            "perplexity/structure": (_perplexity(quantized, weight, model.config.structure), any_seen),
            "perplexity/colour": (_perplexity(quantized_colour, weight, model.config.colour), any_seen),
        }
        commitment = jnp.sum((quantized.commitment + quantized_colour.commitment) * weight)
        terms = {"reconstruction": (error, count), "commitment": (commitment, seen)}
        if key is None:
            return Loss(terms, metrics)
        first, second = jax.random.split(key)
        variables = {
            "structure": model.structure.follow(first, structure, quantized.code, weight, self.decay),
            "colour": model.colour.follow(second, colour, quantized_colour.code, weight, self.decay),
        }
        return Loss(terms, metrics, variables)


def _perplexity(quantized: Quantized, weight_N: jax.Array, codes: int) -> jax.Array:
    """exp of the entropy of the codes in use: how many of them carry the batch."""
    code_N, weight_N = act(quantized.code, "codes"), act(weight_N, "codes")
    share = jnp.zeros((codes,), jnp.float32).at[code_N].add(weight_N / jnp.maximum(jnp.sum(weight_N), 1.0))
    return jnp.exp(-jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.maximum(share, 1e-12)), 0.0)))
