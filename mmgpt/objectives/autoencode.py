"""Training an image tokenizer: reconstruction; the codebooks follow by moving averages."""

import jax
import jax.numpy as jnp

from mmgpt.core.stream import Batch
from mmgpt.models.gain_shape_vq import GainShapeVQ
from mmgpt.objectives.objective import Loss, ObjectiveConfig, counted


class Autoencode:
    class Config(ObjectiveConfig):
        """Decay of the codebooks' averages."""

        decay: float = 0.97

        def build(self) -> "Autoencode":
            return Autoencode(self)

    def __init__(self, c: "Autoencode.Config"):
        self.decay = c.decay
        self.coefficients = {"reconstruction": 1.0}

    def corrupt(self, key: jax.Array, batch: Batch) -> Batch:
        return batch

    def loss(self, model: GainShapeVQ, batch: Batch, key: jax.Array | None) -> Loss:
        """Term "reconstruction" (mean squared error); metrics: PSNR in dB, places painted a picture, codes in use."""
        stream = batch.streams["pixels"]
        weight_B = stream.weight[:, 0]
        codes = jax.lax.stop_gradient(model.encode(stream.feats))
        squares = jnp.square(model.decode(codes) - stream.feats)
        error = jnp.sum(squares * weight_B[:, None, None, None])
        seen = jnp.sum(weight_B)
        count, any_seen = seen * (squares.size // squares.shape[0]), (seen > 0).astype(jnp.float32)
        # The range of a value is 2, its square 4.
        psnr = 10.0 * jnp.log10(4.0 * jnp.maximum(count, 1.0) / jnp.maximum(error, 1e-12))
        painted = (codes[..., 1] > 0) * weight_B[:, None, None]
        metrics = {"psnr": (psnr, any_seen), "painted": (jnp.sum(painted), seen)}
        counts = {
            name: counted(codes[..., number], painted, size)
            for number, (name, size) in enumerate(zip(("colour", "mask"), model.config.codebooks[:2], strict=True))
        }
        terms = {"reconstruction": (error, count)}
        if key is None:
            return Loss(terms, metrics, counts=counts)
        return Loss(terms, metrics, model.follow(key, stream.feats, codes, weight_B, self.decay), counts)
