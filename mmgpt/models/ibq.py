"""Index backpropagation quantisation (arXiv 2412.02692), Emu3.5's vision tokenizer: x16, 131,072 codes of 256 numbers.

The coder is VQGAN's; a place's code is the one whose vector has the largest dot product with its latents, which is what
training with the softmax over the whole codebook makes right.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from mmgpt.core.stream import Batch
from mmgpt.models import VisionConfig
from mmgpt.nn.codes import aligned_code
from mmgpt.nn.conv import Conv
from mmgpt.nn.param import normal, param, take, use
from mmgpt.nn.pyramid import Decoder, Encoder, Pyramid
from mmgpt.nn.quantize import Quantized, index_backpropagation


class IBQ(nnx.Module):
    class Config(VisionConfig):
        """Sizes: `codes` vectors of `dim` numbers; level i of the coder has `channels * multiples[i]` channels.

        `latent` is what the coder itself ends in. Levels in `attention` attend over places, as the lowest one's middle
        does. With `normalised` codebook and latents count by their directions alone. With `remat` the backward pass
        works the residual blocks out again, which a picture of 512 x 512 pixels at full size needs.
        """

        codes: int = 131_072
        dim: int = 256
        latent: int = 256
        channels: int = 256
        multiples: tuple[int, ...] = (1, 1, 2, 2, 4)
        blocks: int = 4
        attention: tuple[int, ...] = (4,)
        normalised: bool = False
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
                heads=1,
                latent=self.latent,
                remat=self.remat,
            )

        @property
        def patch(self) -> int:
            return self.pyramid.factor

        @property
        def codebooks(self) -> tuple[int, ...]:
            return (self.codes,)

        def step_flops(self, batch: Batch) -> float:
            """Matmul operations of one training step: the coder and the dot products with all codes, there and back."""
            B, H, W, _ = batch.streams["pixels"].feats.shape
            places = H * W / self.patch**2
            return 3.0 * B * (self.pyramid.flops(H, W) + 4.0 * places * self.codes * self.dim)

        def build(self, rngs: nnx.Rngs) -> "IBQ":
            self.pyramid.check()
            return IBQ(rngs, self)

    def __init__(self, rngs: nnx.Rngs, c: "IBQ.Config"):
        self.config = c
        self.encoder = Encoder(rngs, c.pyramid)
        self.quantise = Conv(rngs, c.latent, c.dim, side=1)
        axes = "codes embed" if c.dim % 32 == 0 else "codes channels"
        # Of this length, so that a softmax over dot products is neither flat nor settled and moves many codes.
        self.codebook = param(rngs, axes, (c.codes, c.dim), normal(1.0))
        self.restore = Conv(rngs, c.dim, c.latent, side=1)
        self.decoder = Decoder(rngs, c.pyramid)

    def vectors_of_codes(self) -> jax.Array:
        """The codebook `[codes, dim]` as it is compared and decoded, of length 1 where `normalised`."""
        return self._directed(use(self.codebook))

    def latents(self, pixels_BHWC: jax.Array, train: bool = False) -> jax.Array:
        """Latents before quantisation `[B, h, w, dim]` of pixels `[B, H, W, 3]` in -1..1, float32, of length 1 where
        `normalised`."""
        hidden = self.encoder(pixels_BHWC.astype(self.config.dtype))
        return self._directed(self.quantise(hidden).astype(jnp.float32))

    def quantized(self, z_BHWD: jax.Array, commitment: float) -> Quantized:
        """What training makes of latents `[B, h, w, dim]`: the code of the largest dot product."""
        return index_backpropagation(z_BHWD, self.vectors_of_codes(), commitment)

    def pixels(self, vectors_BHWC: jax.Array, train: bool = False) -> jax.Array:
        """Pixels `[B, H, W, 3]` of quantised latents `[B, h, w, dim]`."""
        return self.decoder(self.restore(vectors_BHWC.astype(self.config.dtype))).astype(jnp.float32)

    def encode(self, pixels_BHWC: jax.Array) -> jax.Array:
        """Codes `[B, h, w, 1] int32` of pixels `[B, H, W, 3]` in -1..1."""
        return aligned_code(self.vectors_of_codes(), self.latents(pixels_BHWC))

    def decode(self, codes_BHWC: jax.Array) -> jax.Array:
        """Pixels `[B, H, W, 3]` of codes `[B, h, w, 1]`."""
        vectors = take(self.vectors_of_codes(), codes_BHWC[..., 0], "batch height width channels")
        return self.pixels(vectors)

    def _directed(self, x: jax.Array) -> jax.Array:
        if not self.config.normalised:
            return x
        return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)
