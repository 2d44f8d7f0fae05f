"""An image tokenizer for small images on small machines: each patch becomes a structure code and a colour code.

A patch is drawn as a few colours (the palette, from the colour code) mixed by a mask per pixel (from the structure
code), the way block truncation coding does it (Delp and Mitchell, 1979), with both codes learned. Patches are
independent, so that equal patches have equal codes wherever they lie, and a shape's codes do not depend on its colour.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from mmgpt.core.stream import Batch
from mmgpt.dist import axes as rules
from mmgpt.models import VisionConfig
from mmgpt.nn.param import normal, param, use, zeros
from mmgpt.nn.quantize import Quantized, Quantizer


class MLP(nnx.Module):
    """Two layers with GELU, `[N, in] -> [N, out]`."""

    def __init__(self, rngs: nnx.Rngs, inputs: int, hidden: int, outputs: int):
        self.first = param(rngs, "pixels embed", (inputs, hidden), normal(inputs**-0.5))
        self.first_bias = param(rngs, "norm", (hidden,), zeros)
        self.second = param(rngs, "embed pixels", (hidden, outputs), normal(hidden**-0.5))
        self.second_bias = param(rngs, "norm", (outputs,), zeros)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = jax.nn.gelu(x @ use(self.first) + use(self.first_bias)[None])
        return hidden @ use(self.second) + use(self.second_bias)[None]


class PatchVQ(nnx.Module):
    class Config(VisionConfig):
        """`patch` pixels a side; `structure` and `colour` codes; `palette` colours a patch can mix."""

        patch: int = 8
        structure: int = 512
        colour: int = 64
        palette: int = 3
        width: int = 256
        dim: int = 16

        @property
        def codebooks(self) -> tuple[int, ...]:
            """Sizes in the order of a place's codes: colour first, since it says whether there is structure to draw."""
            return (self.colour, self.structure)

        def step_flops(self, batch: Batch) -> float:
            """Matmul operations of one training step, forward and twice that backward, and the search for codes."""
            B, H, W, _ = batch.streams["pixels"].feats.shape
            places, pixels = B * (H // self.patch) * (W // self.patch), 3 * self.patch**2
            encoders = 2 * self.width * (pixels + self.dim)
            decoders = self.width * (2 * self.dim + self.patch**2 * self.palette + 3 * self.palette)
            return places * (6.0 * (encoders + decoders) + 2.0 * self.dim * (self.structure + self.colour))

        def build(self, rngs: nnx.Rngs) -> "PatchVQ":
            return PatchVQ(rngs, self)

    def __init__(self, rngs: nnx.Rngs, c: "PatchVQ.Config"):
        self.config = c
        pixels = 3 * c.patch**2
        self.to_structure = MLP(rngs, pixels, c.width, c.dim)
        self.to_colour = MLP(rngs, pixels, c.width, c.dim)
        self.structure = Quantizer(rngs, c.structure, c.dim)
        self.colour = Quantizer(rngs, c.colour, c.dim)
        self.to_masks = MLP(rngs, c.dim, c.width, c.patch**2 * c.palette)
        self.to_palette = MLP(rngs, c.dim, c.width, c.palette * 3)

    def patches(self, pixels_BHWC: jax.Array) -> jax.Array:
        """`[B, H, W, 3]` to `[B * h * w, 3 * patch ** 2]`."""
        B, H, W, _ = pixels_BHWC.shape
        p = self.config.patch
        places = rules.spec("batch height height width width channels", rules.ACT)
        grid = pixels_BHWC.reshape(B, H // p, p, W // p, p, 3, out_sharding=places).transpose(0, 1, 3, 2, 4, 5)
        return grid.reshape(-1, 3 * p * p, out_sharding=rules.spec("batch pixels", rules.ACT))

    def latents(self, patches_NP: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Structure and colour vectors of patches, before quantisation."""
        return self.to_structure(patches_NP), self.to_colour(patches_NP)

    def quantize(self, patches_NP: jax.Array) -> tuple[tuple[jax.Array, Quantized], tuple[jax.Array, Quantized]]:
        structure, colour = self.latents(patches_NP)
        return (structure, self.structure(structure)), (colour, self.colour(colour))

    def draw(self, structure_ND: jax.Array, colour_ND: jax.Array) -> jax.Array:
        """Patches `[N, 3 * patch ** 2]` from quantised vectors."""
        c = self.config
        masks = jax.nn.softmax(self.to_masks(structure_ND).reshape(-1, c.patch**2, c.palette), axis=-1)
        palette = self.to_palette(colour_ND).reshape(-1, c.palette, 3)
        return jnp.einsum("npk,nkc->npc", masks, palette).reshape(structure_ND.shape[0], -1)

    def encode(self, pixels_BHWC: jax.Array) -> jax.Array:
        """Codes `[B, h, w, 2] int32` of pixels `[B, H, W, 3]` in -1..1."""
        B, H, W, _ = pixels_BHWC.shape
        structure, colour = self.latents(self.patches(pixels_BHWC))
        codes = jnp.stack([self.colour.encode(colour), self.structure.encode(structure)], axis=-1)
        places = rules.spec("batch height width channels", rules.ACT)
        return codes.reshape(B, H // self.config.patch, W // self.config.patch, 2, out_sharding=places)

    def decode(self, codes_BHWC: jax.Array) -> jax.Array:
        """Pixels `[B, H, W, 3]` in -1..1 of codes `[B, h, w, 2]`."""
        B, h, w, _ = codes_BHWC.shape
        p = self.config.patch
        flat = codes_BHWC.reshape(-1, 2, out_sharding=rules.spec("batch channels", rules.ACT))
        patches = self.draw(self.structure.decode(flat[:, 1]), self.colour.decode(flat[:, 0]))
        places = rules.spec("batch height width height width channels", rules.ACT)
        grid = patches.reshape(B, h, w, p, p, 3, out_sharding=places).transpose(0, 1, 3, 2, 4, 5)
        return grid.reshape(B, h * p, w * p, 3, out_sharding=rules.spec("batch height width channels", rules.ACT))
