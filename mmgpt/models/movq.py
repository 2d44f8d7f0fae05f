"""MoVQGAN with time, Emu3's vision tokenizer (arXiv 2409.18869): x8 in space, x4 in time, 32,768 codes of 4 numbers.

A picture is a clip of one frame shown `temporal` times. The convolutional coder sees single frames; a small stack of
causal 3-D convolutions on its latents shortens time, and another one lengthens it again before the decoder, whose
norms are steered by the quantised latents. The numbers are those of transformers' `Emu3VQVAE`.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from mmgpt.core.config import ConfigError
from mmgpt.core.stream import Batch
from mmgpt.models import VisionConfig
from mmgpt.nn.codes import nearest_code
from mmgpt.nn.conv import BatchNorm, CausalConv, silu
from mmgpt.nn.param import normal, param, take, use
from mmgpt.nn.pyramid import Decoder, Encoder, Pyramid
from mmgpt.nn.quantize import Quantized, vector_quantize


class TimeResidual(nnx.Module):
    """`x + conv(silu(norm(conv(silu(norm(x))))))` over clips, with batch norms."""

    def __init__(self, rngs: nnx.Rngs, channels: int):
        self.norm1 = BatchNorm(rngs, channels)
        self.conv1 = CausalConv(rngs, channels, channels)
        self.norm2 = BatchNorm(rngs, channels)
        self.conv2 = CausalConv(rngs, channels, channels)

    def __call__(self, x_BTHWC: jax.Array, train: bool) -> jax.Array:
        hidden = self.conv1(silu(self.norm1(x_BTHWC, train)))
        return x_BTHWC + self.conv2(silu(self.norm2(hidden, train)))


class MoVQ(nnx.Module):
    class Config(VisionConfig):
        """Sizes: `codes` vectors of `latent` numbers; level i of the coder has `channels * multiples[i]` channels.

        Levels in `attention` attend over places, with `heads` heads, as the lowest one's middle does. `temporal` is the
        number of frames that share a place's code, a power of two. With `remat` the backward pass works the residual
        blocks out again, which a picture of 512 x 512 pixels at full size needs.
        """

        codes: int = 32_768
        latent: int = 4
        channels: int = 256
        multiples: tuple[int, ...] = (1, 2, 2, 4)
        blocks: int = 2
        attention: tuple[int, ...] = (3,)
        heads: int = 1
        temporal: int = 4
        remat: bool = False
        dtype: Literal["float32", "bfloat16"] = "float32"

        @property
        def pyramid(self) -> Pyramid:
            """The sizes of the coder."""
            return Pyramid(
                channels=self.channels,
                multiples=self.multiples,
                blocks=self.blocks,
                attention=self.attention,
                heads=self.heads,
                latent=self.latent,
                remat=self.remat,
            )

        @property
        def patch(self) -> int:
            return self.pyramid.factor

        @property
        def codebooks(self) -> tuple[int, ...]:
            return (self.codes,)

        @property
        def halvings(self) -> int:
            """How often time is halved."""
            return int(math.log2(self.temporal))

        @property
        def past(self) -> int:
            """Two for each 3-D convolution at the codes' rate, and less than two for those at higher rates."""
            return 2 + 4 * self.blocks + (2 if self.halvings else 0)

        def step_flops(self, batch: Batch) -> float:
            """Matmul operations of one training step on such pictures, forward and twice that backward."""
            B, H, W, _ = batch.streams["pixels"].feats.shape
            return 3.0 * B * self.pyramid.flops(H, W)

        def build(self, rngs: nnx.Rngs) -> "MoVQ":
            self.pyramid.check()
            if self.temporal < 1 or self.temporal != 2**self.halvings:
                raise ConfigError(f"model.temporal is {self.temporal}; it must be a power of two.")
            return MoVQ(rngs, self)

    def __init__(self, rngs: nnx.Rngs, c: "MoVQ.Config"):
        self.config = c
        times, blocks, dim = range(c.halvings), range(c.blocks), c.latent
        self.encoder = Encoder(rngs, c.pyramid)
        self.halve = nnx.List([CausalConv(rngs, dim, dim, time=4, stride=2) for _ in times])
        self.after = nnx.List([TimeResidual(rngs, dim) for _ in blocks])
        self.quantise = CausalConv(rngs, dim, dim, side=1)
        # Of length 1: codes that begin close to zero take long to part, and most then stay unused.
        self.codebook = param(rngs, "codes channels", (c.codes, dim), normal(dim**-0.5))
        self.restore = CausalConv(rngs, dim, dim, side=1)
        self.before = nnx.List([TimeResidual(rngs, dim) for _ in blocks])
        self.double = nnx.List([CausalConv(rngs, dim, dim) for _ in times])
        self.decoder = Decoder(rngs, c.pyramid, steering=dim)

    # --- the halves on both sides of the codes, for training and for clips in chunks

    def features(self, pixels_BHWC: jax.Array) -> jax.Array:
        """What the coder makes of single frames, `[B, h, w, latent]`."""
        return self.encoder(pixels_BHWC.astype(self.config.dtype)).astype(jnp.float32)

    def latents_of(self, features_BTHWC: jax.Array, train: bool = False) -> jax.Array:
        """Latents before quantisation `[B, T / temporal, h, w, latent]` of the features of a clip's frames."""
        x = features_BTHWC
        for conv in self.halve:
            x = silu(conv(x))
        for block in self.after:
            x = block(x, train)
        return self.quantise(x)

    def frames_of(self, vectors_BTHWC: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """What each frame is drawn from: the decoder's input and what steers it, `[B, T * temporal, h, w, latent]`."""
        B, _, *place = vectors_BTHWC.shape
        # Both go the same way as two clips, and in training are one batch to the norms.
        x = jnp.stack([self.restore(vectors_BTHWC), vectors_BTHWC], axis=1)
        x = x.reshape(2 * B, *vectors_BTHWC.shape[1:])
        for block in self.before:
            x = block(x, train)
        for conv in self.double:
            x = silu(conv(jnp.repeat(x, 2, axis=1)))
        x = x.reshape(B, 2, -1, *place)
        return x[:, 0], x[:, 1]

    def draw(self, hidden_BHWC: jax.Array, steering_BHWC: jax.Array) -> jax.Array:
        """Pixels `[B, H, W, 3]` of single frames."""
        dtype = self.config.dtype
        return self.decoder(hidden_BHWC.astype(dtype), steering_BHWC.astype(dtype)).astype(jnp.float32)

    def vectors(self, codes_BHWC: jax.Array) -> jax.Array:
        """The codebook's vectors `[..., latent]` of codes `[..., 1]`, laid out as pictures or as clips."""
        axes = "batch height width channels" if codes_BHWC.ndim == 4 else "batch time height width channels"
        return take(use(self.codebook), codes_BHWC[..., 0], axes)

    # --- pictures

    def latents(self, pixels_BHWC: jax.Array, train: bool = False) -> jax.Array:
        """Latents before quantisation `[B, h, w, latent]` of pixels `[B, H, W, 3]` in -1..1, float32.

        In training the batch norms take the batch's statistics and move the running ones, `Variable`s of the module.
        """
        features = self.features(pixels_BHWC)
        return self.latents_of(_still(features, self.config.temporal), train)[:, 0]

    def quantized(self, z_BHWD: jax.Array, commitment: float) -> Quantized:
        """What training makes of latents `[B, h, w, latent]`: the nearest code."""
        return vector_quantize(z_BHWD, use(self.codebook), commitment)

    def pixels(self, vectors_BHWC: jax.Array, train: bool = False) -> jax.Array:
        """Pixels `[B, H, W, 3]` of quantised latents `[B, h, w, latent]`: the first of the frames they stand for."""
        hidden, steering = self.frames_of(vectors_BHWC[:, None], train)
        return self.draw(hidden[:, 0], steering[:, 0])

    def encode(self, pixels_BHWC: jax.Array) -> jax.Array:
        """Codes `[B, h, w, 1] int32` of pixels `[B, H, W, 3]` in -1..1."""
        return nearest_code(use(self.codebook), self.latents(pixels_BHWC))

    def decode(self, codes_BHWC: jax.Array) -> jax.Array:
        """Pixels `[B, H, W, 3]` of codes `[B, h, w, 1]`."""
        return self.pixels(self.vectors(codes_BHWC))

    # --- clips, in one piece

    def encode_clip(self, pixels_BTHWC: jax.Array) -> jax.Array:
        """Codes `[B, T / temporal, h, w, 1] int32` of clips `[B, T, H, W, 3]`; T is a multiple of `temporal`."""
        return self.codes_of(_unfolded(self.features(_folded(pixels_BTHWC)), pixels_BTHWC.shape[1]))

    def codes_of(self, features_BTHWC: jax.Array) -> jax.Array:
        """Codes `[B, T / temporal, h, w, 1]` of the features of a clip's frames."""
        latents = self.latents_of(features_BTHWC)
        return _unfolded(nearest_code(use(self.codebook), _folded(latents)), latents.shape[1])

    def decode_clip(self, codes_BTHWC: jax.Array) -> jax.Array:
        """Pixels `[B, T * temporal, H, W, 3]` of codes `[B, T, h, w, 1]`."""
        hidden, steering = self.frames_of(self.vectors(codes_BTHWC))
        return _unfolded(self.draw(_folded(hidden), _folded(steering)), hidden.shape[1])


def _still(x_BHWC: jax.Array, times: int) -> jax.Array:
    """One frame shown several times."""
    return jnp.broadcast_to(x_BHWC[:, None], (len(x_BHWC), times, *x_BHWC.shape[1:]))


def _folded(x_BTHWC: jax.Array) -> jax.Array:
    """Frames as pictures of their own, `[B * T, H, W, C]`."""
    return x_BTHWC.reshape(-1, *x_BTHWC.shape[2:])


def _unfolded(x_NHWC: jax.Array, frames: int) -> jax.Array:
    return x_NHWC.reshape(-1, frames, *x_NHWC.shape[1:])
