"""Training an image tokenizer whose codes are found by gradients: reconstruction, quantisation, and a discriminator.

The recipe of VQGAN (arXiv 2012.09841) for any model with `latents`, `quantized`, `pixels` and `codebook`. The totals of
generator and discriminator are worked out in one backward pass: the generator's terms see a discriminator that is held
fixed, the discriminator's a picture that is. Their parameters are groups of their own in the optimizer.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from mmgpt.core.config import ConfigError
from mmgpt.core.stream import Batch
from mmgpt.models import ModelConfig, lpips
from mmgpt.models.discriminator import PatchGAN, hinge
from mmgpt.nn.image_metrics import SIDE, psnr, ssim
from mmgpt.nn.param import Variable
from mmgpt.nn.quantize import entropies
from mmgpt.objectives.objective import Loss, ObjectiveConfig, SumWeight, counted


class VqGan:
    class Config(ObjectiveConfig):
        """Coefficients of the terms; what has coefficient 0 is not computed.

        Pixels lie in -1..1; `distance` is that of the reconstruction. `entropy` weighs the entropy of each place's
        softmax over the codes at `temperature` (low: a code fits clearly) minus `diversity` times that of their mean
        (high: all codes are used). `perceptual` weighs LPIPS with the weights in the file `vgg`; without a file there
        is none. The discriminator joins in at step `start`; `adversarial` is a fixed coefficient, not one balanced by
        gradient norms, so that the loss stays a sum of terms.
        """

        distance: Literal["absolute", "square"] = "square"
        quantization: float = 1.0
        commitment: float = 0.25
        entropy: float = 0.0
        temperature: float = 0.01
        diversity: float = 1.0
        perceptual: float = 1.0
        vgg: str = ""
        discriminator: PatchGAN.Config | None = None
        adversarial: float = 0.1
        start: int = 0

        def trained(self, model: ModelConfig) -> Callable[[nnx.Rngs], Any]:
            """The model with the discriminator as its attribute `discriminator`, if there is one."""

            def build(rngs: nnx.Rngs) -> Any:
                module = model.build(rngs)
                if not all(hasattr(module, part) for part in ("latents", "quantized", "pixels")):
                    raise ConfigError(
                        f"{type(module).__name__} has no latents, quantized and pixels, by which this objective trains "
                        "a tokenizer; name another model, as MoVQ or IBQ, or another objective."
                    )
                if self.discriminator is not None:
                    module.discriminator = self.discriminator.build(rngs)
                return module

            return build

        def build(self) -> "VqGan":
            if self.temperature <= 0:
                raise ConfigError(f"objective.temperature is {self.temperature}; it must be above 0.")
            return VqGan(self)

    def __init__(self, c: "VqGan.Config"):
        self.config = c
        self.coefficients = {
            "reconstruction": 1.0,
            "quantization": c.quantization,
            "entropy": c.entropy,
            "perceptual": c.perceptual,
            "adversarial": c.adversarial,
            "discriminator": 1.0,
        }

    @functools.cached_property
    def _vgg(self) -> lpips.Weights:
        """Read when the first loss is traced: who opens the run only to use the model needs no file."""
        return lpips.load(Path(self.config.vgg))

    def corrupt(self, key: jax.Array, batch: Batch) -> Batch:
        return batch

    def loss(self, model: Any, batch: Batch, key: jax.Array | None) -> Loss:
        """Terms as in `Config`; metrics: PSNR in dB and, in evaluation, SSIM, by picture; counts: the codes."""
        c, train = self.config, key is not None
        stream = batch.streams["pixels"]
        pixels, weight_B = stream.feats, stream.weight[:, 0]
        found = model.quantized(model.latents(pixels, train), c.commitment)
        drawn = model.pixels(found.vectors, train)
        off = drawn - pixels
        off = jnp.abs(off) if c.distance == "absolute" else jnp.square(off)
        weight_BHW = jnp.broadcast_to(weight_B[:, None, None], found.code.shape)
        terms = {
            "reconstruction": _mean(jnp.mean(off, axis=(1, 2, 3)), weight_B),
            "quantization": _mean(found.loss, weight_BHW),
        }
        if c.entropy:
            each_BHW, of_mean = entropies(found.scores, weight_BHW, c.temperature)
            total, places = _mean(each_BHW, weight_BHW)
            terms["entropy"] = total - c.diversity * of_mean * places, places
        if c.vgg and c.perceptual:
            terms["perceptual"] = _mean(lpips.distance(self._vgg, drawn, pixels), weight_B)
        if c.discriminator is not None:
            terms |= self._adversary(model.discriminator, pixels, drawn, weight_B, train)
        inside = jax.lax.stop_gradient(jnp.clip(drawn, -1.0, 1.0))
        metrics = {"psnr": _mean(psnr(inside, pixels), weight_B)}
        if not train and min(pixels.shape[1:3]) >= SIDE:
            metrics["ssim"] = _mean(ssim(inside, pixels), weight_B)
        counts = {"codes": counted(found.code, weight_BHW, found.scores.shape[-1])}
        variables = nnx.to_pure_dict(nnx.state(model, Variable)) if train else None
        return Loss(terms, metrics, variables, counts)

    def _adversary(
        self, discriminator: PatchGAN, real: jax.Array, drawn: jax.Array, weight_B: jax.Array, train: bool
    ) -> dict[str, SumWeight]:
        """The generator's term, the discriminator held fixed, and the discriminator's, the drawn picture held fixed."""
        structure, state = nnx.split(discriminator)
        judge = nnx.merge(structure, jax.tree.map(jax.lax.stop_gradient, state))
        verdict = judge(drawn, train)
        of_real, of_drawn = discriminator(real, train), discriminator(jax.lax.stop_gradient(drawn), train)
        begun = (discriminator.steps[...] >= self.config.start).astype(jnp.float32)
        if train:
            discriminator.steps[...] = discriminator.steps[...] + 1
        mistaken, weight = _mean(jnp.mean(hinge(of_real, of_drawn), axis=(1, 2)), weight_B)
        fooled, _ = _mean(jnp.mean(-verdict, axis=(1, 2)), weight_B)
        return {"adversarial": (fooled * begun, weight), "discriminator": (mistaken * begun, weight)}


def _mean(value: jax.Array, weight: jax.Array) -> SumWeight:
    return jnp.sum(value * weight), jnp.sum(weight)
