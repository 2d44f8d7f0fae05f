"""The convolutional coder of VQGAN (arXiv 2012.09841): a picture to latents over levels of half the size, and back.

MoVQ (arXiv 2209.09002) is the same with norms in the decoder that also see the quantised latents.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mmgpt.core.config import ConfigError
from mmgpt.nn.conv import Conv, Doubled, GroupNorm, Halved, SpatialNorm, silu


class Pyramid(NamedTuple):
    """Sizes: `channels` times `multiples[i]` on level i, of `blocks` residual blocks each; `latent` channels below.

    Levels in `attention` also attend over their places, as the lowest one's middle always does, with `heads` heads.
    With `remat` the backward pass works residual blocks out again.
    """

    channels: int
    multiples: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...]
    heads: int
    latent: int
    remat: bool = False

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.channels * multiple for multiple in self.multiples)

    @property
    def factor(self) -> int:
        """Pixels a side of a place on the lowest level."""
        return 2 ** (len(self.multiples) - 1)

    def check(self) -> None:
        """ConfigError on sizes that make no coder."""
        if not self.multiples or min(self.channels, *self.multiples, self.blocks, self.heads, self.latent) < 1:
            raise ConfigError("model.channels, multiples, blocks, heads and latent must be at least 1.")
        if self.channels % 2:
            raise ConfigError(f"model.channels is {self.channels}; it must be even, since norms take them in pairs.")
        attending = {len(self.widths) - 1, *self.attention}
        if not attending <= set(range(len(self.widths))) or any(self.widths[i] % self.heads for i in attending):
            raise ConfigError(
                f"model.attention {self.attention} must be levels below {len(self.widths)} whose channels are a "
                f"multiple of model.heads {self.heads}."
            )

    def flops(self, height: int, width: int) -> float:
        """Matmul operations of encoding and decoding a picture once."""
        last, adds = len(self.widths) - 1, 2 * 9.0 * 3 * self.channels * height * width
        for i, wide in enumerate(self.widths):
            places = height * width / 4**i
            above, below = (self.channels, *self.widths)[i], self.widths[min(i + 1, last)]
            attentions = (2 * self.blocks + 1) * (i in self.attention)
            adds += 9 * wide * places * (above + below + 4 * self.blocks * wide)  # residual blocks of both sides
            adds += wide * places * ((above if above != wide else 0) + (below if below != wide else 0))
            if i < last:
                adds += 9 * wide * wide * places / 4  # halved
            if i > 0:
                adds += 16 * wide * wide * places  # doubled: 4 of 9 products for each of 4 pixels
            if i == last:
                attentions += 2
                adds += (
                    9 * wide * places * (8 * wide + 2 * self.latent)
                )  # both middles, and where latents leave and enter
            adds += attentions * wide * places * (4 * wide + 2 * places)
        return 2.0 * adds


Norm = GroupNorm | SpatialNorm


def norm(rngs: nnx.Rngs, channels: int, latent: int | None) -> Norm:
    """GroupNorm, or with `latent` channels a SpatialNorm that the latents steer."""
    return GroupNorm(rngs, channels) if latent is None else SpatialNorm(rngs, channels, latent)


def _normed(norm: Norm, x_BHWC: jax.Array, latent_BhwC: jax.Array | None) -> jax.Array:
    if isinstance(norm, GroupNorm):
        return norm(x_BHWC)
    assert latent_BhwC is not None
    return norm(x_BHWC, latent_BhwC)


class Residual(nnx.Module):
    """`x + conv(silu(norm(conv(silu(norm(x))))))`; a 1 x 1 convolution on the way past where the width changes."""

    def __init__(self, rngs: nnx.Rngs, inputs: int, outputs: int, latent: int | None):
        self.norm1 = norm(rngs, inputs, latent)
        self.conv1 = Conv(rngs, inputs, outputs)
        self.norm2 = norm(rngs, outputs, latent)
        self.conv2 = Conv(rngs, outputs, outputs)
        self.past = Conv(rngs, inputs, outputs, side=1) if inputs != outputs else None

    def __call__(self, x_BHWC: jax.Array, latent_BhwC: jax.Array | None) -> jax.Array:
        hidden = self.conv1(silu(_normed(self.norm1, x_BHWC, latent_BhwC)))
        hidden = self.conv2(silu(_normed(self.norm2, hidden, latent_BhwC)))
        return hidden + (x_BHWC if self.past is None else self.past(x_BHWC))


class PlaceAttention(nnx.Module):
    """Every place of a picture attends to all, around a residual connection."""

    def __init__(self, rngs: nnx.Rngs, channels: int, heads: int, latent: int | None):
        self.norm = norm(rngs, channels, latent)
        self.q = Conv(rngs, channels, channels, side=1)
        self.k = Conv(rngs, channels, channels, side=1)
        self.v = Conv(rngs, channels, channels, side=1)
        self.out = Conv(rngs, channels, channels, side=1)
        self.heads = heads

    def __call__(self, x_BHWC: jax.Array, latent_BhwC: jax.Array | None) -> jax.Array:
        B, H, W, C = x_BHWC.shape
        normed = _normed(self.norm, x_BHWC, latent_BhwC)
        places, heads = (B, H * W, C), (B, H * W, self.heads, C // self.heads)
        q, k, v = (layer(normed).reshape(places).reshape(heads) for layer in (self.q, self.k, self.v))
        logits = jnp.einsum("bthk,bshk->bhts", q, k, preferred_element_type=jnp.float32)
        seen = jax.nn.softmax(logits * heads[-1] ** -0.5, axis=-1).astype(x_BHWC.dtype)
        read = jnp.einsum("bhts,bshk->bthk", seen, v).reshape(places)
        return x_BHWC + self.out(read.reshape(B, H, W, C))


class Level(nnx.Module):
    """Residual blocks of one width, each followed by attention if the level has it, then a change of size if any."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        inputs: int,
        outputs: int,
        *,
        blocks: int,
        heads: int | None,
        latent: int | None,
        remat: bool,
        resize: type[Halved] | type[Doubled] | None,
    ):
        widths = [inputs] + [outputs] * (blocks - 1)
        self.block = nnx.List([Residual(rngs, width, outputs, latent) for width in widths])
        attention = [PlaceAttention(rngs, outputs, heads, latent) for _ in widths] if heads is not None else []
        self.attention = nnx.List(attention)
        self.resize = resize(rngs, outputs) if resize is not None else None
        self.remat = remat

    def __call__(self, x: jax.Array, latent: jax.Array | None) -> jax.Array:
        for i, block in enumerate(self.block):
            x = jax.checkpoint(block.__call__)(x, latent) if self.remat else block(x, latent)
            if self.attention:
                x = self.attention[i](x, latent)
        return x if self.resize is None else self.resize(x)


class Middle(nnx.Module):
    """Residual block, attention, residual block."""

    def __init__(self, rngs: nnx.Rngs, channels: int, heads: int, latent: int | None):
        self.before = Residual(rngs, channels, channels, latent)
        self.attention = PlaceAttention(rngs, channels, heads, latent)
        self.after = Residual(rngs, channels, channels, latent)

    def __call__(self, x: jax.Array, latent: jax.Array | None) -> jax.Array:
        return self.after(self.attention(self.before(x, latent), latent), latent)


class Encoder(nnx.Module):
    """Pictures `[B, H, W, 3]` to `[B, H / factor, W / factor, latent]`."""

    def __init__(self, rngs: nnx.Rngs, p: Pyramid):
        self.enter = Conv(rngs, 3, p.channels)
        self.level = nnx.List([])
        last = len(p.widths) - 1
        for i, (inputs, outputs) in enumerate(zip((p.channels, *p.widths), p.widths, strict=False)):
            heads, resize = p.heads if i in p.attention else None, Halved if i < last else None
            self.level.append(
                Level(rngs, inputs, outputs, blocks=p.blocks, heads=heads, latent=None, remat=p.remat, resize=resize)
            )
        self.middle = Middle(rngs, p.widths[-1], p.heads, None)
        self.norm = norm(rngs, p.widths[-1], None)
        self.leave = Conv(rngs, p.widths[-1], p.latent)

    def __call__(self, pixels_BHWC: jax.Array) -> jax.Array:
        x = self.enter(pixels_BHWC)
        for level in self.level:
            x = level(x, None)
        x = self.middle(x, None)
        return self.leave(silu(_normed(self.norm, x, None)))


class Decoder(nnx.Module):
    """Latents `[B, h, w, latent]` to pictures `[B, h * factor, w * factor, 3]`, a block a level more than the encoder.

    With `steering` channels all norms are SpatialNorms by those of the second argument. `level` counts from the full
    size down, as in the encoder.
    """

    def __init__(self, rngs: nnx.Rngs, p: Pyramid, steering: int | None = None):
        self.enter = Conv(rngs, p.latent, p.widths[-1])
        self.middle = Middle(rngs, p.widths[-1], p.heads, steering)
        levels = []
        for i, outputs in reversed(list(enumerate(p.widths))):
            inputs = p.widths[min(i + 1, len(p.widths) - 1)]
            heads, resize = p.heads if i in p.attention else None, Doubled if i > 0 else None
            blocks = p.blocks + 1
            levels.append(
                Level(rngs, inputs, outputs, blocks=blocks, heads=heads, latent=steering, remat=p.remat, resize=resize)
            )
        self.level = nnx.List(levels[::-1])
        self.norm = norm(rngs, p.widths[0], steering)
        self.leave = Conv(rngs, p.widths[0], 3)

    def __call__(self, latent_BhwC: jax.Array, steering_BhwC: jax.Array | None = None) -> jax.Array:
        x = self.middle(self.enter(latent_BhwC), steering_BhwC)
        for level in reversed(list(self.level)):
            x = level(x, steering_BhwC)
        return self.leave(silu(_normed(self.norm, x, steering_BhwC)))
