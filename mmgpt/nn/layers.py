"""Layers without attention: embedding, normalisation, rotary positions, feed-forward, dropout."""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from mmgpt.core.config import Config
from mmgpt.dist import axes as rules
from mmgpt.kernels import few_rows
from mmgpt.nn.param import constant, einsum, normal, param, use, zeros

made_once = jax.lax.optimization_barrier
"""`made_once(x)`: x behind a barrier, and its gradient too. XLA would work a value out again in every product that
reads it, for every block of the product's other side: on a TPU that costs up to half of the product's time."""


@jax.custom_vjp
def gradient_made_once(x: jax.Array) -> jax.Array:
    """x, whose gradient alone is behind a barrier."""
    return x


gradient_made_once.defvjp(lambda x: (x, None), lambda _, g: (made_once(g),))


def row_major(x: jax.Array) -> jax.Array:
    """x, and its gradient, in memory in the order of its dimensions: a TPU's compiler may choose another for what many
    layers pass on, and then turns it round in each."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last axis with a learned gain, in float32 (arXiv 1910.07467)."""

    def __init__(self, rngs: nnx.Rngs, width: int, epsilon: float, gain: float = 1.0):
        self.scale = param(rngs, "norm", (width,), constant(gain))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
        gain = use(self.scale).reshape((1,) * (x.ndim - 1) + (-1,))
        return (x32 * inverse * gain).astype(x.dtype)

    def bound(self) -> jax.Array:
        """The most that the root mean square of an output can be."""
        return jnp.max(jnp.abs(use(self.scale)))


class HeadNorm(nnx.Module):
    """Layer normalisation of each head by itself, with a gain and a bias of its own (Chameleon, arXiv 2405.09818)."""

    def __init__(self, rngs: nnx.Rngs, axes: str, heads: int, head_dim: int, gain: float = 1.0):
        self.scale = param(rngs, f"{axes} head_dim", (heads, head_dim), constant(gain))
        self.bias = param(rngs, f"{axes} head_dim", (heads, head_dim), zeros)

    def __call__(self, x_BTHK: jax.Array) -> jax.Array:
        x32 = x_BTHK.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + 1e-5)  # the published constant
        return (x32 * inverse * use(self.scale)[None, None] + use(self.bias)[None, None]).astype(x_BTHK.dtype)

    def bound(self) -> jax.Array:
        """The most that the root mean square of a head's output can be."""
        return jnp.max(jnp.abs(use(self.scale))) + jnp.max(jnp.abs(use(self.bias)))


class GatedMLP(nnx.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))` (arXiv 2002.05202)."""

    def __init__(self, rngs: nnx.Rngs, embed: int, mlp: int, down_scale: float):
        self.gate = param(rngs, "embed mlp", (embed, mlp), normal(embed**-0.5))
        self.up = param(rngs, "embed mlp", (embed, mlp), normal(embed**-0.5))
        self.down = param(rngs, "mlp embed", (mlp, embed), normal(down_scale * mlp**-0.5))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x_BTD = made_once(x_BTD)
        gate, up = (
            gradient_made_once(checkpoint_name(einsum("btd,df->btf", x_BTD, w, "batch seq mlp"), "mlp"))
            for w in (self.gate, self.up)
        )
        return einsum("btf,fd->btd", made_once(jax.nn.silu(gate) * up), self.down, "batch seq embed")


class SummedMLP(nnx.Module):
    """A `GatedMLP` for steps of few rows on a CPU (`kernels/few_rows.py`): its weights, outputs first; float32."""

    def __init__(self, mlp: GatedMLP):
        self.gate, self.up, self.down = (jnp.transpose(use(w)) for w in (mlp.gate, mlp.up, mlp.down))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return few_rows.gated(x_BTD, self.gate, self.up, self.down)


class RopeScaling(Config):
    """How the rotary frequencies of a model with a stretched context differ from the plain ones.

    "linear" divides all by `factor` (arXiv 2306.15595). "llama3" divides those that turn less than `low` times within
    the `original` context, leaves those that turn more than `high` times, and blends between (arXiv 2407.21783).
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low: float = 1.0
    high: float = 4.0
    original: int = 8192

    def scaled(self, frequency: jax.Array) -> jax.Array:
        """The frequencies of the stretched context."""
        if self.kind == "linear":
            return frequency / self.factor
        turns = self.original * frequency / (2.0 * math.pi)
        kept = jnp.clip((turns - self.low) / (self.high - self.low), 0.0, 1.0)
        return frequency * (kept + (1.0 - kept) / self.factor)


class Turn(NamedTuple):
    """By what the pairs of a head turn at each position: cosines, then sines, `[B, T, K] float32`."""

    both: jax.Array

    @property
    def cos(self) -> jax.Array:
        """`[B, T, 1, K / 2]`."""
        return self.both[:, :, None, : self.both.shape[-1] // 2]

    @property
    def sin(self) -> jax.Array:
        """`[B, T, 1, K / 2]`."""
        return self.both[:, :, None, self.both.shape[-1] // 2 :]


def turn(
    position_BTA: jax.Array,
    head_dim: int,
    theta: float,
    grid: int,
    grid_theta: float,
    scaling: RopeScaling | None = None,
) -> Turn:
    """What `rotary` turns by, made once for all layers.

    `position [B, T, 3]`: the last `2 * grid` of a half's frequencies turn with the row and column in the picture
    (multimodal RoPE, arXiv 2409.12191), the others with the number in the document.
    """
    position = position_BTA.astype(jnp.float32)
    frequency = _frequencies(head_dim // 2 - 2 * grid, theta)
    angles = [position[..., :1] * (frequency if scaling is None else scaling.scaled(frequency))]
    if grid:
        angles += [position[..., axis : axis + 1] * _frequencies(grid, grid_theta) for axis in (1, 2)]
    angle = jnp.concatenate(angles, axis=-1)
    return Turn(made_once(jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)))


def rotary(x_BTHK: jax.Array, by: Turn) -> jax.Array:
    """Rotary position embedding, halves convention (arXiv 2104.09864; Hugging Face Llama's layout)."""
    half = x_BTHK.shape[-1] // 2
    first, second = x_BTHK[..., :half].astype(jnp.float32), x_BTHK[..., half:].astype(jnp.float32)
    turned = jnp.concatenate([first * by.cos - second * by.sin, second * by.cos + first * by.sin], axis=-1)
    return turned.astype(x_BTHK.dtype)


def _frequencies(count: int, theta: float) -> jax.Array:
    return (theta ** (-jnp.arange(count, dtype=jnp.float32) / count))[None, None, :]


def dropout(x_BTD: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes a share `rate` of the values and scales up the others; nothing without a key (evaluation)."""
    if key is None or rate == 0.0:
        return x_BTD
    # Where a sharding is not asked for, every device draws for the whole batch; the draws are the same either way.
    spec = rules.spec("batch seq embed", rules.ACT, x_BTD.shape, "dropout")
    keep = jax.random.bernoulli(key, 1.0 - rate, x_BTD.shape, out_sharding=spec)
    return jnp.where(keep, x_BTD / (1.0 - rate), jnp.zeros((), x_BTD.dtype))
