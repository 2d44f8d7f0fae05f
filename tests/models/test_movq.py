"""MoVQ is transformers' `Emu3VQVAE`: the same tensors, the same codes of real pictures and clips, the same pixels."""

import os
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sklearn.datasets import load_sample_image

from mmgpt.core.config import ConfigError
from mmgpt.data.media import decode_video, encode_mp4, resize
from mmgpt.dist.mesh import Mesh
from mmgpt.interop.vision_names import movq_entries
from mmgpt.models.movq import MoVQ
from mmgpt.nn.conv import BatchNorm
from mmgpt.nn.param import Variable
from mmgpt.train.state import Structure
from tests.models.published import adopted, randomised, spread_codes

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = MoVQ.Config(codes=256, channels=32, multiples=(1, 1, 2, 2), blocks=1, attention=(3,))


def theirs(c: MoVQ.Config) -> Any:
    return transformers.Emu3VQVAEConfig(
        codebook_size=c.codes,
        embed_dim=c.latent,
        latent_channels=c.latent,
        base_channels=c.channels,
        channel_multiplier=list(c.multiples),
        num_res_blocks=c.blocks,
        attn_resolutions=list(c.attention),
        hidden_size=c.channels * c.multiples[-1],
        num_attention_heads=c.heads,
        temporal_downsample_factor=c.temporal,
    )


class Both:
    """The same tokenizer there and here.

    The codebook is a draw (of 300) in which no place of the pictures below lies within 1.6e-6 of being as near to
    another code: rounding moves the difference of two distances by 2e-7 at most, so that it never chooses.
    """

    def __init__(self, c: MoVQ.Config):
        self.peer = randomised(transformers.Emu3VQVAE(theirs(c)), 0)
        seen = self.latents(normal(photograph("china", 96, 128))[None, None].repeat(c.temporal, 1))
        spread_codes(self.peer, np.moveaxis(seen.numpy(), 2, -1).reshape(-1, c.latent), 149)
        self.mesh = Mesh.Config(fsdp=1).build(jax.devices()[:1])
        with jax.set_mesh(self.mesh):
            structure = Structure(c.build, 0)
            self._arrays = adopted(movq_entries(c), self.peer, structure)
        self._jitted = functools.cache(
            lambda method: jax.jit(lambda params, variables, x: getattr(structure.merge(params, variables), method)(x))
        )

    def ours(self, method: str, x: np.ndarray) -> np.ndarray:
        with jax.set_mesh(self.mesh):
            return np.asarray(self._jitted(method)(*self._arrays, jnp.asarray(x)))

    def latents(self, clips_BTHWC: np.ndarray) -> Any:
        """The peer's latents before quantisation, `[B, t, latent, h, w]`."""
        with torch.no_grad():
            hidden = self.peer.encoder(torch.tensor(np.moveaxis(clips_BTHWC, -1, -3).copy()))
            return self.peer.quant_conv(hidden.permute(0, 2, 1, 3, 4)).permute(0, 2, 1, 3, 4)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """The peer's codes of pictures `[B, H, W, 3]` or of clips `[B, T, H, W, 3]`."""
        with torch.no_grad():
            if pixels.ndim == 5:
                return self.peer.quantize(self.latents(pixels)).numpy()
            moved = torch.tensor(np.moveaxis(pixels, -1, -3).copy())
            return torch.stack(self.peer.encode(moved, [pixels.shape[1:3]] * len(pixels)).image_tokens).numpy()

    def decode(self, codes: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return np.moveaxis(self.peer.decode(torch.tensor(codes.astype(np.int64))).numpy(), -3, -1)


@functools.cache
def small() -> Both:
    return Both(SMALL)


def photograph(name: str, height: int, width: int) -> np.ndarray:
    """A photograph of scikit-learn's, uint8."""
    return resize(load_sample_image(f"{name}.jpg"), height, width)


def normal(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32) / 127.5 - 1.0


@functools.cache
def panned() -> np.ndarray:
    """A window that moves over a photograph, as an H.264 clip decoded again, uint8 [8, 96, 128, 3]."""
    wide = photograph("china", 213, 320)
    frames = np.stack([wide[4 * t : 4 * t + 96, 8 * t : 8 * t + 128] for t in range(8)])
    decoded, _ = decode_video(encode_mp4(frames, 8.0))
    return decoded


@pytest.mark.parametrize("name", ["china", "flower"])
def test_codes_of_photographs_are_equal_and_pixels_within_a_thousandth(name: str) -> None:
    pixels = normal(photograph(name, 136, 200))[None]
    codes = small().ours("encode", pixels)
    expected = small().encode(pixels)
    assert len(np.unique(expected)) > SMALL.codes // 2
    np.testing.assert_array_equal(codes[..., 0], expected)
    drawn, peer = small().ours("decode", codes), small().decode(expected)
    assert drawn.shape == pixels.shape
    np.testing.assert_allclose(drawn, peer, rtol=0, atol=1e-3 * np.ptp(peer))


def test_codes_of_a_real_clip_are_equal_and_frames_within_a_thousandth() -> None:
    pixels = normal(panned())[None]
    codes = small().ours("encode_clip", pixels)
    expected = small().encode(pixels)
    assert codes.shape == (1, 2, 12, 16, 1) and len(np.unique(expected)) > SMALL.codes // 2
    assert (expected[:, 0] != expected[:, 1]).mean() > 0.5
    np.testing.assert_array_equal(codes[..., 0], expected)
    frames, peer = small().ours("decode_clip", codes), small().decode(expected)
    assert frames.shape == pixels.shape
    np.testing.assert_allclose(frames, peer, rtol=0, atol=1e-3 * np.ptp(peer))


def test_a_picture_is_a_clip_of_one_frame_shown_again_and_again() -> None:
    pixels = normal(photograph("flower", 64, 96))[None]
    still = np.repeat(pixels[:, None], SMALL.temporal, axis=1)
    np.testing.assert_array_equal(small().ours("encode", pixels), small().ours("encode_clip", still)[:, 0])


def test_batch_norms_in_training_follow_the_data_as_torch_does() -> None:
    module = torch.nn.BatchNorm3d(4)
    x = np.random.default_rng(0).normal(1.0, 2.0, (2, 3, 5, 6, 4)).astype(np.float32)
    with jax.set_mesh(Mesh.Config(fsdp=1).build(jax.devices()[:1])):
        ours = BatchNorm(nnx.Rngs(params=jax.random.key(0)), 4)
        for scaled in (x, 3.0 * x):
            expected = module(torch.tensor(np.moveaxis(scaled, -1, 1)))
            found = ours(jnp.asarray(scaled), train=True)
            np.testing.assert_allclose(np.moveaxis(found, -1, 1), expected.detach(), atol=1e-5)
        np.testing.assert_allclose(ours.mean[...], module.running_mean, rtol=1e-5)
        np.testing.assert_allclose(ours.variance[...], module.running_var, rtol=1e-5)
        assert int(ours.batches[...]) == int(module.num_batches_tracked) == 2
        expected = module.eval()(torch.tensor(np.moveaxis(x, -1, 1)))
        np.testing.assert_allclose(np.moveaxis(ours(jnp.asarray(x), train=False), -1, 1), expected.detach(), atol=1e-5)


def test_training_counts_both_clips_of_the_decoder_as_one_batch() -> None:
    """The decoder's norms see the latents and the codes' vectors together, as in the peer in training mode."""
    peer = randomised(transformers.Emu3VQVAE(theirs(SMALL)), 1).train()
    with jax.set_mesh(Mesh.Config(fsdp=1).build(jax.devices()[:1])):
        structure = Structure(SMALL.build, 0)
        arrays = adopted(movq_entries(SMALL), peer, structure)
        x = np.random.default_rng(0).normal(size=(2, 2, 4, 4, SMALL.latent)).astype(np.float32)

        @jax.jit
        def forward(arrays: Any, x: jax.Array) -> Any:
            model = structure.merge(*arrays)
            frames = model.frames_of(x, train=True)
            return frames, nnx.to_pure_dict(nnx.state(model, Variable))

        (hidden, steering), after = forward(arrays, jnp.asarray(x))
        with torch.no_grad():
            moved = torch.tensor(np.moveaxis(x, -1, 1).copy())
            both = torch.cat([peer.post_quant_conv(moved), moved])
            for layer in peer.decoder.time_res_stack:
                both = layer(both)
            for layer in peer.decoder.time_conv:
                both = torch.nn.functional.silu(layer(both))
        np.testing.assert_allclose(np.concatenate([hidden, steering]), np.moveaxis(both.numpy(), 1, -1), atol=1e-4)
        norm = peer.decoder.time_res_stack[0].norm1
        np.testing.assert_allclose(after["before"][0]["norm1"]["mean"], norm.running_mean, atol=1e-6)
        np.testing.assert_allclose(after["before"][0]["norm1"]["variance"], norm.running_var, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"channels": 33}, "must be even"),
        ({"temporal": 3}, "power of two"),
        ({"attention": (4,)}, "levels below 4"),
        ({"heads": 3}, "multiple of model.heads"),
        ({"blocks": 0}, "at least 1"),
    ],
)
def test_sizes_that_make_no_tokenizer_are_told(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        SMALL.replace(**changes).build(nnx.Rngs(params=jax.random.key(0)))
