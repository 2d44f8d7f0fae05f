"""Convolutions and what stands between them: norms over channels, halving and doubling. Channels lie last everywhere.

That layout is the fast one on TPU and here on CPU (XLA's NHWC convolutions took 0.6 to 0.8 of NCHW's time, measured at
64 to 512 channels). Reductions are in float32.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from mmgpt.nn.param import Init, Param, Variable, constant, param, use, zeros

GROUPS = 32
"""Groups of channels that GroupNorm normalises apart, so every wide layer has a multiple of them."""


def uniform(fan_in: int) -> Init:
    """Uniform within 1 / sqrt(fan_in), which convolutional tokenizers are usually trained from (arXiv 2012.09841)."""
    bound = 1.0 / math.sqrt(fan_in)
    return lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def _axes(window: str, inputs: int, outputs: int) -> str:
    """Logical axes of a kernel: a wide end is `embed`, split at rest; colours and latents would not divide."""
    if inputs >= GROUPS:
        return f"{window} embed channels"
    return f"{window} channels embed" if outputs >= GROUPS else f"{window} channels channels"


def silu(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(x)


class Conv(nnx.Module):
    """Convolution `[B, H, W, I]` to `[B, H, W, O]` with `side x side` kernels (odd), zeros outside the picture."""

    def __init__(self, rngs: nnx.Rngs, inputs: int, outputs: int, side: int = 3):
        fan_in = side * side * inputs
        axes = _axes("height width", inputs, outputs)
        self.kernel = param(rngs, axes, (side, side, inputs, outputs), uniform(fan_in))
        self.bias = param(rngs, "norm", (outputs,), uniform(fan_in))
        self.side = side

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        around = self.side // 2, self.side // 2
        return _convolved(x_BHWC, self.kernel, self.bias, (1, 1), (around, around))


class Halved(nnx.Module):
    """Half the height and width: a 3 x 3 convolution at every other pixel, zeros after the last row and column."""

    def __init__(self, rngs: nnx.Rngs, channels: int):
        self.conv = Conv(rngs, channels, channels)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        return _convolved(x_BHWC, self.conv.kernel, self.conv.bias, (2, 2), ((0, 1), (0, 1)))


class Doubled(nnx.Module):
    """Twice the height and width: every pixel four times, then a 3 x 3 convolution.

    Of the nine pixels that a new one sees, some are the same old one. So each of the four new pixels in an old one's
    place is a 2 x 2 convolution of old pixels by sums of weights: 16 products where 36 would be.
    """

    def __init__(self, rngs: nnx.Rngs, channels: int):
        self.conv = Conv(rngs, channels, channels)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        B, H, W, _ = x_BHWC.shape
        rows = _halves(use(self.conv.kernel, x_BHWC.dtype), axis=0)
        kernel = jnp.concatenate([part for row in rows for part in _halves(row, axis=1)], axis=3)
        around = ((1, 1), (1, 1))
        out = _window_sums(x_BHWC, kernel, (1, 1), around)  # [B, H + 1, W + 1, 4 O]: all four from every corner
        outputs = out.shape[3] // 4
        four = [[out[:, i : i + H, j : j + W, outputs * (2 * i + j) :][..., :outputs] for j in (0, 1)] for i in (0, 1)]
        wide = [jnp.stack(pair, axis=3).reshape(B, H, 2 * W, outputs) for pair in four]
        doubled = jnp.stack(wide, axis=2).reshape(B, 2 * H, 2 * W, outputs)
        return doubled + _last(use(self.conv.bias, x_BHWC.dtype), 4)


def _halves(kernel: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Weights by old pixels, two of the three along `axis` falling on one, for the first new pixel and the second."""
    first, middle, last = jnp.split(kernel, 3, axis=axis)
    return jnp.concatenate([first, middle + last], axis=axis), jnp.concatenate([first + middle, last], axis=axis)


def repeated(x_BHWC: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Every pixel as often as fills `size` (rows, columns), a multiple of what is there."""
    B, H, W, C = x_BHWC.shape
    shape = (B, H, size[0] // H, W, size[1] // W, C)
    # One pair of axes at a time: a sharded array is reshaped in no other way.
    rows = jnp.broadcast_to(x_BHWC[:, :, None, :, None], shape).reshape(B, size[0], *shape[3:])
    return rows.reshape(B, *size, C)


class CausalConv(nnx.Module):
    """Convolution over clips `[B, T, H, W, C]` that looks back in time: two steps of zeros stand before the first.

    `time` is the kernel's length in time, `side` its height and width (odd); of 2 x T steps `stride` 2 leaves T.
    """

    def __init__(self, rngs: nnx.Rngs, inputs: int, outputs: int, time: int = 3, side: int = 3, stride: int = 1):
        fan_in = time * side * side * inputs
        axes = _axes("time height width", inputs, outputs)
        self.kernel = param(rngs, axes, (time, side, side, inputs, outputs), uniform(fan_in))
        self.bias = param(rngs, "norm", (outputs,), uniform(fan_in))
        self.stride, self.side = stride, side

    def __call__(self, x_BTHWC: jax.Array) -> jax.Array:
        around = self.side // 2, self.side // 2
        return _convolved(x_BTHWC, self.kernel, self.bias, (self.stride, 1, 1), ((2, 0), around, around))


def _convolved(
    x: jax.Array, kernel: Param, bias: Param, strides: tuple[int, ...], padding: tuple[tuple[int, int], ...]
) -> jax.Array:
    return _window_sums(x, use(kernel, x.dtype), strides, padding) + _last(use(bias, x.dtype), x.ndim)


def _window_sums(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding: tuple[tuple[int, int], ...]
) -> jax.Array:
    dimensions = ("NHWC", "HWIO", "NHWC") if x.ndim == 4 else ("NDHWC", "DHWIO", "NDHWC")
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=dimensions)


def _last(vector: jax.Array, ndim: int) -> jax.Array:
    """A vector along the last of `ndim` axes."""
    return vector.reshape((1,) * (ndim - 1) + (-1,))


class GroupNorm(nnx.Module):
    """Normalisation over the pixels of groups of channels, in float32 (arXiv 1803.08494).

    There are 32 groups, or groups of two channels where their number is no multiple of that.
    """

    def __init__(self, rngs: nnx.Rngs, channels: int, epsilon: float = 1e-6):
        self.scale = param(rngs, "norm", (channels,), constant(1.0))
        self.bias = param(rngs, "norm", (channels,), zeros)
        self.groups, self.epsilon = GROUPS if channels % GROUPS == 0 else channels // 2, epsilon

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        x = x_BHWC.astype(jnp.float32)
        mean = self._mean(x)
        spread = self._mean(jnp.square(x - mean))  # of the centred values: the difference of two means would cancel
        gain = jax.lax.rsqrt(spread + self.epsilon) * _last(use(self.scale), 4)
        return (x * gain + (_last(use(self.bias), 4) - mean * gain)).astype(x_BHWC.dtype)

    def _mean(self, x_BHWC: jax.Array) -> jax.Array:
        """Mean of each channel's group `[B, 1, 1, C]`: first over pixels, which a CPU does in whole vectors."""
        B, _, _, C = x_BHWC.shape
        groups = jnp.mean(x_BHWC, axis=(1, 2)).reshape(B, self.groups, C // self.groups)
        mean = jnp.mean(groups, axis=2, keepdims=True)
        return jnp.broadcast_to(mean, groups.shape).reshape(B, C)[:, None, None]


class SpatialNorm(nnx.Module):
    """GroupNorm whose gain and shift at each place come from the latents there (arXiv 2209.09002)."""

    def __init__(self, rngs: nnx.Rngs, channels: int, latent: int):
        self.norm = GroupNorm(rngs, channels)
        self.gain = Conv(rngs, latent, channels, side=1)
        self.shift = Conv(rngs, latent, channels, side=1)

    def __call__(self, x_BHWC: jax.Array, latent_BhwC: jax.Array) -> jax.Array:
        size = x_BHWC.shape[1], x_BHWC.shape[2]
        # At the latents' size, then repeated: the same numbers as the other way round, for a fraction of the work.
        return self.norm(x_BHWC) * repeated(self.gain(latent_BhwC), size) + repeated(self.shift(latent_BhwC), size)


class BatchNorm(nnx.Module):
    """Normalisation by statistics of the data (arXiv 1502.03167): of the batch in training, of past batches after.

    In training a call also moves the running statistics, which are `Variable`s of this module: read them from the
    module after the forward pass. They are the global batch's, however many devices hold it.
    """

    def __init__(self, rngs: nnx.Rngs, channels: int, epsilon: float = 1e-5, momentum: float = 0.1):
        self.scale = param(rngs, "norm", (channels,), constant(1.0))
        self.bias = param(rngs, "norm", (channels,), zeros)
        self.mean = param(rngs, "norm", (channels,), zeros, kind=Variable)
        self.variance = param(rngs, "norm", (channels,), constant(1.0), kind=Variable)
        self.batches = param(rngs, "", (), lambda key, shape: jnp.zeros(shape, jnp.int32), kind=Variable)
        self.epsilon, self.momentum = epsilon, momentum

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x32 = x.astype(jnp.float32)
        mean, variance = self.mean[...], self.variance[...]
        if train:
            over = tuple(range(x.ndim - 1))
            mean = jnp.mean(x32, axis=over)
            variance = jnp.mean(jnp.square(x32 - _last(mean, x.ndim)), axis=over)
            self._follow(*jax.lax.stop_gradient((mean, variance)), x.size // x.shape[-1])
        gain = jax.lax.rsqrt(variance + self.epsilon) * use(self.scale)
        shift = use(self.bias) - mean * gain
        return (x32 * _last(gain, x.ndim) + _last(shift, x.ndim)).astype(x.dtype)

    def _follow(self, mean: jax.Array, variance: jax.Array, count: int) -> None:
        unbiased = variance * (count / max(count - 1, 1))
        self.mean[...] = (1.0 - self.momentum) * self.mean[...] + self.momentum * mean
        self.variance[...] = (1.0 - self.momentum) * self.variance[...] + self.momentum * unbiased
        self.batches[...] = self.batches[...] + 1
