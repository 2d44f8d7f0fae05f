"""PatchGAN: says of every patch of a picture whether it looks real (arXiv 1611.07004), as VQGAN uses it."""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from mmgpt.core import config
from mmgpt.core.config import ConfigError
from mmgpt.nn.conv import BatchNorm
from mmgpt.nn.param import Variable, normal, param, use, zeros

SIDE = 4
"""Pixels a side of every kernel."""


class PatchGAN(nnx.Module):
    """Convolutions that halve `layers` times, with batch norms and leaky rectifiers; one logit for each patch."""

    class Config(config.Config):
        """Sizes: the first layer has `channels` channels, the next ones twice as many each, up to eight times."""

        channels: int = 64
        layers: int = 3

        def build(self, rngs: nnx.Rngs) -> "PatchGAN":
            if self.channels < 1 or self.layers < 1:
                raise ConfigError("the discriminator's channels and layers must be at least 1.")
            return PatchGAN(rngs, self)

    def __init__(self, rngs: nnx.Rngs, c: "PatchGAN.Config"):
        widths = [c.channels * min(2**i, 8) for i in range(c.layers + 1)]
        self.enter = Window(rngs, 3, widths[0], stride=2, bias=True)
        sizes = zip(itertools.pairwise(widths), [2] * (c.layers - 1) + [1], strict=True)
        self.window = nnx.List([Window(rngs, *size, stride=stride, bias=False) for size, stride in sizes])
        self.norm = nnx.List([BatchNorm(rngs, width) for width in widths[1:]])
        self.leave = Window(rngs, widths[-1], 1, stride=1, bias=True)
        # Steps that the discriminator has seen, by which an objective begins late.
        self.steps = param(rngs, "", (), lambda key, shape: jnp.zeros(shape, jnp.int32), kind=Variable)

    def __call__(self, pixels_BHWC: jax.Array, train: bool = False) -> jax.Array:
        """Logits `[B, rows, columns]` of pixels `[B, H, W, 3]` in -1..1, high where a patch looks real.

        In training the norms take the batch's statistics and follow them.
        """
        x = _leaky(self.enter(pixels_BHWC))
        for window, norm in zip(self.window, self.norm, strict=True):
            x = _leaky(norm(window(x), train))
        return self.leave(x)[..., 0]


class Window(nnx.Module):
    """Convolution with 4 x 4 kernels and one pixel of zeros on every side."""

    def __init__(self, rngs: nnx.Rngs, inputs: int, outputs: int, *, stride: int, bias: bool):
        axes = "height width channels channels"
        self.kernel = param(rngs, axes, (SIDE, SIDE, inputs, outputs), normal(0.02))
        self.bias = param(rngs, "norm", (outputs,), zeros) if bias else None
        self.stride = stride

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        kernel, one = use(self.kernel, x_BHWC.dtype), (1, 1)
        strides, dimensions = (self.stride, self.stride), ("NHWC", "HWIO", "NHWC")
        out = jax.lax.conv_general_dilated(x_BHWC, kernel, strides, (one, one), dimension_numbers=dimensions)
        return out if self.bias is None else out + use(self.bias, x_BHWC.dtype).reshape(1, 1, 1, -1)


def _leaky(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, 0.2 * x)


def hinge(real: jax.Array, drawn: jax.Array) -> jax.Array:
    """What the discriminator minimises at each patch: 0 where real ones are above 1 and drawn ones below -1."""
    return 0.5 * (jax.nn.relu(1.0 - real) + jax.nn.relu(1.0 + drawn))
