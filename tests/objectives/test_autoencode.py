"""Training an image tokenizer: the error falls, dead codes come back, and rows without a picture do not count."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmgpt.core.stream import Batch, Stream
from mmgpt.dist.mesh import Mesh
from mmgpt.models.patch_vq import PatchVQ
from mmgpt.nn.quantize import Quantizer
from mmgpt.objectives.autoencode import Autoencode
from mmgpt.objectives.objective import mean
from mmgpt.train.optimizer import Optimizer
from mmgpt.train.state import Structure
from mmgpt.train.step import make_evaluation, make_step, place
from tests import tiny

MODEL = PatchVQ.Config(patch=4, structure=16, colour=8, width=32, dim=8)


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(Mesh.Config().build(jax.devices()[:1])):
        yield


def pictures(rows: int, seed: int) -> Batch:
    """8 x 8 pixels: a plain ground and a bar, each of one of four colours."""
    rng = np.random.default_rng(seed)
    palette = np.array([[-1, -1, -1], [1, -0.5, -0.5], [-0.5, 1, 0], [0, 0, 1]], np.float32)
    feats = palette[rng.integers(0, 4, rows)][:, None, None, :] * np.ones((1, 8, 8, 1), np.float32)
    for picture, colour, at in zip(feats, rng.integers(0, 4, rows), rng.integers(0, 4, rows), strict=True):
        picture[:, 2 * at : 2 * at + 2] = palette[colour]
    stream = Stream(feats=feats, weight=np.ones((rows, 1), np.float32), kind="pixels")
    return Batch(streams={"pixels": stream}, visibility={}, row_id=np.arange(rows, dtype=np.int64))


def test_training_reduces_the_error_and_uses_the_codes() -> None:
    structure = Structure(MODEL.build, seed=0)
    objective, optimizer = Autoencode.Config().build(), Optimizer.Config(warmup=5, weight_decay=0.0).build(100)
    state = tiny.state(structure, optimizer)
    step = make_step(structure, objective, optimizer, seed=0, ema=None)
    told = []
    for i in range(100):
        state, values = step(state, place(pictures(16, i)))
        told.append({name: float(value) for name, value in values.items()})
    assert told[-1]["psnr"] > told[0]["psnr"] + 5
    assert told[-1]["perplexity/structure"] > 1.5 and told[-1]["perplexity/colour"] > 2
    model = structure.merge(state["params"], state["variables"])
    seen = jnp.asarray(pictures(16, 999).streams["pixels"].feats)
    drawn = model.decode(model.encode(seen))
    assert drawn.shape == seen.shape
    assert float(jnp.mean(jnp.square(drawn - seen))) < 0.5 * float(jnp.mean(jnp.square(seen - jnp.mean(seen))))


def test_encoding_and_decoding_keep_places() -> None:
    """A patch's codes depend on that patch alone."""
    model = MODEL.build(nnx.Rngs(0))
    first = pictures(2, 0).streams["pixels"].feats
    second = first.copy()
    second[:, :4, 4:] = 0.3
    a, b = (np.asarray(model.encode(jnp.asarray(x))) for x in (first, second))
    assert a.shape == (2, 2, 2, 2) and a.dtype == np.int32
    assert a[..., 0].max() < 8 and a[..., 1].max() < 16
    unchanged = np.array([[True, False], [True, True]])
    assert np.array_equal(a[:, unchanged], b[:, unchanged])
    drawn = np.asarray(model.decode(jnp.asarray(np.where(unchanged[None, :, :, None], a, 1))))
    whole = np.asarray(model.decode(jnp.asarray(a)))
    assert np.array_equal(drawn[:, 4:], whole[:, 4:]) and np.array_equal(drawn[:, :4, :4], whole[:, :4, :4])


def test_rows_without_a_picture_do_not_count() -> None:
    structure = Structure(MODEL.build, seed=0)
    params, variables = (tiny.drawn(part) for part in structure.abstract())
    evaluate = make_evaluation(structure, Autoencode.Config().build())
    full = pictures(4, 0)
    stream = full.streams["pixels"]
    feats = np.concatenate([stream.feats, np.full_like(stream.feats, 0.7)])
    weight = np.concatenate([stream.weight, np.zeros_like(stream.weight)])
    more = Batch(
        streams={"pixels": dataclasses.replace(stream, feats=feats, weight=weight)}, visibility={}, row_id=np.arange(8)
    )
    alone, beside = (evaluate(params, variables, place(batch)) for batch in (full, more))
    assert alone.keys() == beside.keys()
    for name in alone:
        assert float(mean(alone[name])) == pytest.approx(float(mean(beside[name])), rel=1e-5), name
    empty = dataclasses.replace(stream, weight=np.zeros_like(stream.weight))
    nothing = evaluate(params, variables, place(dataclasses.replace(full, streams={"pixels": empty})))
    assert all(float(mean(pair)) == 0.0 for pair in nothing.values())


def test_used_codes_follow_their_vectors_and_dead_ones_restart_where_the_error_is() -> None:
    quantizer = Quantizer(nnx.Rngs(0), 4, 2)
    quantizer.codebook[...] = jnp.array([[0.0, 0.0], [9.0, 9.0], [-9.0, 9.0], [9.0, -9.0]])
    quantizer.count[...] = jnp.array([10.0, 0.0, 0.0, 0.0])
    z = jnp.concatenate([jnp.full((39, 2), 0.01), jnp.array([[3.0, 3.0]])])
    code = quantizer.encode(z)
    assert np.asarray(code).tolist() == [0] * 40
    new = quantizer.follow(jax.random.key(0), z, code, jnp.ones(40), 0.9)
    assert np.allclose(new["codebook"][1:], 3.0)  # the one vector that is far from its code
    assert (np.asarray(new["count"])[1:] > 0).all()
    rate = 0.1 * 40 / (0.9 * 10 + 0.1 * 40)
    np.testing.assert_allclose(new["codebook"][0], rate * np.mean(z, axis=0), rtol=1e-5)
    assert float(new["count"][0]) == pytest.approx(0.9 * 10 + 0.1 * 40)


def test_the_gradient_passes_straight_through() -> None:
    quantizer = Quantizer(nnx.Rngs(0), 4, 2)
    z = jnp.asarray(np.random.default_rng(0).standard_normal((5, 2)), jnp.float32)
    nearest = quantizer.decode(quantizer.encode(z))
    value, gradient = jax.value_and_grad(lambda z: jnp.sum(quantizer(z).value * 2.0))(z)
    assert float(value) == pytest.approx(2 * float(jnp.sum(nearest)), rel=1e-5) and np.allclose(gradient, 2.0)
