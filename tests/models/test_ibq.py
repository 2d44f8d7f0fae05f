"""The coder of IBQ is VQGAN's, which transformers' Janus tokenizer has too; its codes are by dot products."""

import os
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_sample_image

from mmgpt.data.media import resize
from mmgpt.dist.mesh import Mesh
from mmgpt.interop.vision_names import ibq_entries
from mmgpt.models.ibq import IBQ
from mmgpt.nn.codes import aligned_code, nearest_code
from mmgpt.train.state import Structure
from tests import tiny

SMALL = IBQ.Config(codes=200, dim=16, latent=32, channels=32, multiples=(1, 1, 2), blocks=1, attention=(2,))


@pytest.fixture
def one_device():
    with jax.set_mesh(Mesh.Config(fsdp=1).build(jax.devices()[:1])):
        yield


def called(structure: Structure, method: str, arrays: Any, x: Any) -> Any:
    """One method of the model with some parameters and variables, compiled."""
    return jax.jit(lambda arrays, x: getattr(structure.merge(*arrays), method)(x))(arrays, jnp.asarray(x))


def photographs(height: int, width: int) -> np.ndarray:
    pictures = [resize(load_sample_image(f"{name}.jpg"), height, width) for name in ("china", "flower")]
    return np.stack(pictures).astype(np.float32) / 127.5 - 1.0


def test_the_coder_is_transformers_janus_vqgan(one_device) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tests.models.published import adopted, randomised

    sizes = transformers.JanusVQVAEConfig(
        embed_dim=SMALL.dim,
        num_embeddings=SMALL.codes,
        latent_channels=SMALL.latent,
        base_channels=SMALL.channels,
        channel_multiplier=list(SMALL.multiples),
        num_res_blocks=SMALL.blocks,
        num_patches=8,
    )
    peer = randomised(transformers.JanusVQVAE(sizes), 0)
    peer.decoder.up = torch.nn.ModuleList(reversed(peer.decoder.up))  # Janus counts the decoder's levels from below
    structure = Structure(SMALL.build, 0)
    arrays = adopted(ibq_entries(SMALL), peer, structure)
    peer.decoder.up = torch.nn.ModuleList(reversed(peer.decoder.up))
    pixels = photographs(32, 32)
    with torch.no_grad():
        latents = peer.quant_conv(peer.encoder(torch.tensor(np.moveaxis(pixels, -1, 1).copy())))
        codes = torch.einsum("bdhw,nd->bhwn", latents, peer.quantize.embedding.weight).argmax(-1)
        vectors = peer.quantize.embedding(codes).permute(0, 3, 1, 2)  # not its own lookup, which normalises
        drawn = peer.decoder(peer.post_quant_conv(vectors))
    ours = called(structure, "latents", arrays, pixels)
    np.testing.assert_allclose(ours, np.moveaxis(latents.numpy(), 1, -1), atol=2e-5)
    np.testing.assert_array_equal(called(structure, "encode", arrays, pixels)[..., 0], codes)
    assert len(np.unique(codes)) > 20
    found = called(structure, "decode", arrays, codes.numpy()[..., None].astype(np.int32))
    assert np.abs(found - np.moveaxis(drawn.numpy(), 1, -1)).max() < 1e-3 * np.ptp(drawn.numpy())


def test_a_normalised_codebook_ignores_lengths(one_device) -> None:
    c = SMALL.replace(normalised=True)
    structure = Structure(c.build, 0)
    params, variables = (tiny.drawn(part) for part in structure.abstract())
    longer = {**params, "codebook": params["codebook"] * jnp.linspace(0.1, 9.0, c.codes)[:, None]}, variables
    pixels = photographs(16, 16)
    codes = called(structure, "encode", (params, variables), pixels)
    np.testing.assert_array_equal(codes, called(structure, "encode", longer, pixels))
    latents = called(structure, "latents", (params, variables), pixels)
    np.testing.assert_allclose(jnp.linalg.norm(latents, axis=-1), 1.0, atol=1e-5)
    drawn = called(structure, "decode", (params, variables), codes)
    np.testing.assert_allclose(drawn, called(structure, "decode", longer, codes), atol=1e-4)


def test_full_size_is_as_published() -> None:
    """455M parameters, within 1 % (the system's report, table of tokenizers); x16; one code of 131,072 a place."""
    with jax.set_mesh(Mesh.Config(fsdp=8).build()):
        count = Structure(IBQ.Config().build, 0).parameters()
    assert abs(count / 455e6 - 1) < 0.01
    assert IBQ.Config().patch == 16 and IBQ.Config().codebooks == (131_072,)


@pytest.mark.parametrize("codes", [1, 7, 1000])
def test_codes_are_those_of_all_scores_at_once(codes: int, one_device) -> None:
    """In blocks or whole, and of equal scores the first: the definition, written out by numpy."""
    rng = np.random.default_rng(0)
    book = rng.integers(-2, 3, (codes, 4)).astype(np.float32)  # whole numbers: scores are exact, and many are equal
    z = rng.integers(-2, 3, (2, 5, 3, 4)).astype(np.float32)
    apart = np.square(z[..., None, :] - book).sum(-1)
    np.testing.assert_array_equal(nearest_code(jnp.asarray(book), jnp.asarray(z))[..., 0], apart.argmin(-1))
    np.testing.assert_array_equal(aligned_code(jnp.asarray(book), jnp.asarray(z))[..., 0], (z @ book.T).argmax(-1))


def test_blocks_of_places_do_not_change_codes(one_device, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    book, z = jnp.asarray(rng.normal(size=(50, 8))), jnp.asarray(rng.normal(size=(2, 7, 5, 8)))
    whole = nearest_code(book, z)
    monkeypatch.setattr("mmgpt.nn.codes.BLOCK", 150)  # three places at a time, the last block not full
    np.testing.assert_array_equal(nearest_code(book, z), whole)
