"""A tokenizer's clips: in windows the same codes and frames as in one piece, on one device and on eight."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmgpt.data.images import ImageRows
from mmgpt.dist.mesh import Mesh
from mmgpt.models.gain_shape_vq import GainShapeVQ
from mmgpt.models.movq import MoVQ
from mmgpt.objectives.autoencode import Autoencode
from mmgpt.objectives.vq_gan import VqGan
from mmgpt.tokenize import vision
from mmgpt.tokenize.vision import VisionTokenizer
from mmgpt.train.run import Built, Opened, Run
from mmgpt.train.state import Structure
from tests import tiny

MODEL = MoVQ.Config(codes=64, channels=32, multiples=(1, 1), blocks=1, attention=())
DATA = ImageRows.Config(sources=(), height=8, width=8, batch_rows=8)


@functools.cache
def opened(devices: int) -> Opened:
    return drawn(Run(model=MODEL, objective=VqGan.Config(), data=DATA), devices)


def drawn(run: Run, devices: int) -> Opened:
    """A run with random numbers on some of the devices."""
    mesh = Mesh.Config().build(jax.devices()[:devices])
    with jax.set_mesh(mesh):
        structure = Structure(run.model.build, 0)
        built = Built(run, mesh, None, structure, run.objective.build(), run.optimizer.build(run.steps))
        return Opened(built, 0, *(tiny.drawn(part) for part in structure.abstract()))


@functools.cache
def clip(frames: int) -> np.ndarray:
    """A moving pattern with detail."""
    rng = np.random.default_rng(0)
    wide = np.kron(rng.integers(0, 256, (8, 40, 3)), np.ones((2, 2, 1))).astype(np.uint8)
    return np.stack([wide[:16, t % 60 : t % 60 + 16] for t in range(frames)])


@functools.cache
def whole() -> tuple[np.ndarray, np.ndarray]:
    """Codes and frames of 63 frames, filled up to 64, by the model's own methods in one piece."""
    run = opened(1)
    frames = np.concatenate([clip(63), clip(63)[-1:]])
    pixels = jnp.asarray(frames[None], jnp.float32) / 127.5 - 1.0
    with jax.set_mesh(run.built.mesh):
        model = run.built.structure.merge
        codes = jax.jit(lambda p, v, x: model(p, v).encode_clip(x))(run.params, run.variables, pixels)
        drawn = jax.jit(lambda p, v, c: model(p, v).decode_clip(c))(run.params, run.variables, codes)
    return np.asarray(codes)[0], np.asarray(drawn)[0]


@pytest.mark.parametrize(("devices", "batch"), [(1, 32), (1, 1000), (8, 8)], ids=["windows", "whole", "eight devices"])
def test_a_clip_in_windows_has_the_codes_and_frames_of_one_piece(devices: int, batch: int) -> None:
    codes, drawn = whole()
    assert len(np.unique(codes)) > 10 and MODEL.past < 16  # so that batches of 32 frames make two windows or more
    tokenizer = VisionTokenizer(opened(devices), batch=batch)
    assert (tokenizer.temporal, tokenizer.patch) == (4, 2)
    np.testing.assert_array_equal(tokenizer.encode_clip(clip(63)), codes)
    frames = tokenizer.decode_clip(codes)
    assert frames.shape == (64, 16, 16, 3) and frames.dtype == np.uint8
    assert np.abs(frames - np.clip((drawn + 1.0) * 127.5, 0, 255)).max() < 0.51


def test_pictures_are_encoded_by_full_batches_of_one_compiled_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are; a picture's codes do not depend on those beside it."""
    tokenizer = VisionTokenizer(opened(1), batch=8)
    shapes: list[tuple[int, ...]] = []
    real = tokenizer._encode
    monkeypatch.setattr(tokenizer, "_encode", lambda rows: (shapes.append(rows.shape), real(rows))[1])
    whole = tokenizer.encode(clip(21))
    for count in (1, 8, 9, 20):
        np.testing.assert_array_equal(tokenizer.encode(clip(21)[:count]), whole[:count])
    assert shapes == [(8, 16, 16, 3)] * (3 + 1 + 1 + 2 + 3)


def test_parts_of_any_lengths_make_the_same_codes() -> None:
    """As a decoder of long films yields them; nothing but a window of features is held."""
    tokenizer = VisionTokenizer(opened(1), batch=32)
    parts = np.split(clip(63), [1, 2, 40, 57])
    found = list(tokenizer.encode_parts(iter(parts)))
    assert len(found) > 1
    np.testing.assert_array_equal(np.concatenate(found), whole()[0])


def test_the_past_is_what_a_code_depends_on() -> None:
    """A frame changes codes' latents after it within `past`, and none further on or before its own."""
    run = opened(1)
    model = run.built.structure.merge
    features = np.random.default_rng(0).normal(size=(1, 96, 2, 2, MODEL.latent)).astype(np.float32)
    with jax.set_mesh(run.built.mesh):
        latents = jax.jit(lambda x: model(run.params, run.variables).latents_of(x))
        changed = features.copy()
        changed[:, 20:24] += 1.0
        apart = np.abs(np.asarray(latents(changed) - latents(features))).max(axis=(0, 2, 3, 4))
        frames = jax.jit(lambda x: jnp.concatenate(model(run.params, run.variables).frames_of(x), axis=-1))
        moved = features[:, :24].copy()
        moved[:, 5] += 1.0
        redrawn = np.abs(np.asarray(frames(moved) - frames(features[:, :24]))).max(axis=(0, 2, 3, 4))
    assert np.flatnonzero(apart).min() == 5 and 5 < np.flatnonzero(apart).max() <= 5 + MODEL.past
    assert np.flatnonzero(redrawn).min() == 4 * 5 and np.flatnonzero(redrawn).max() < 4 * (5 + MODEL.past + 1)


def test_without_shared_codes_frames_are_pictures() -> None:
    model = GainShapeVQ.Config(patch=4, side=4, stride=4, masks=7, colours=3, worth=0.1)
    tokenizer = VisionTokenizer(drawn(Run(model=model, objective=Autoencode.Config(), data=DATA), 1), batch=4)
    codes = tokenizer.encode_clip(clip(10))
    np.testing.assert_array_equal(codes, tokenizer.encode(clip(10)))
    np.testing.assert_array_equal(tokenizer.decode_clip(codes), tokenizer.decode(codes))


def test_large_pictures_are_encoded_fewer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = VisionTokenizer(opened(1), batch=16)
    codes = tokenizer.encode(clip(5))
    monkeypatch.setattr(vision, "PIXELS", 2 * 16 * 16)
    np.testing.assert_array_equal(VisionTokenizer(opened(1), batch=16).encode(clip(5)), codes)


def test_a_published_folder_is_opened_and_finds_its_own_codes(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peer = transformers.Emu3VQVAE(
        transformers.Emu3VQVAEConfig(
            codebook_size=64,
            base_channels=32,
            channel_multiplier=[1, 1],
            num_res_blocks=1,
            attn_resolutions=[],
            hidden_size=32,
        )
    )
    peer.save_pretrained(tmp_path)
    tokenizer = VisionTokenizer.load(tmp_path)
    assert (tokenizer.codebooks, tokenizer.patch, tokenizer.temporal) == ((64,), 2, 4)
    pixels = torch.tensor(np.moveaxis(clip(3), -1, 1) / np.float32(127.5) - 1.0)
    with torch.no_grad():
        expected = torch.stack(peer.encode(pixels, [(16, 16)] * 3).image_tokens)
    assert len(np.unique(expected)) > 5
    np.testing.assert_array_equal(tokenizer.encode(clip(3))[..., 0], expected)
