"""Training an image tokenizer: the error falls, dead codes come back, and rows without a picture do not count."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmgpt.core.stream import Batch, Stream
from mmgpt.dist.mesh import Mesh
from mmgpt.models.gain_shape_vq import GainShapeVQ
from mmgpt.nn.quantize import Quantizer
from mmgpt.objectives.autoencode import Autoencode
from mmgpt.objectives.objective import mean
from mmgpt.train.optimizer import Optimizer
from mmgpt.train.state import State, Structure
from mmgpt.train.step import make_evaluation, make_step, place
from tests import tiny

MODEL = GainShapeVQ.Config(patch=4, side=6, masks=8, colours=6, worth=1.0)
GROUND = 0.7
INKS = np.array([[-1, -1, -1], [1, -0.8, -0.8], [-0.8, -0.6, 1]], np.float32)
PLUS = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], bool)


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(Mesh.Config().build(jax.devices()[:1])):
        yield


def picture(*things: tuple[int, int, int, int]) -> np.ndarray:
    """16 x 16 pixels with a square (0) or a plus (1) of 3 x 3 pixels for each (kind, ink, row, column)."""
    pixels = np.full((16, 16, 3), GROUND, np.float32)
    for kind, ink, row, column in things:
        pixels[row : row + 3, column : column + 3][PLUS if kind else np.ones((3, 3), bool)] = INKS[ink]
    return pixels


def pictures(rows: int, seed: int) -> Batch:
    """Two things in each picture, one in the upper half and one in the lower."""
    rng = np.random.default_rng(seed)
    draw = [[rng.integers(0, high, 2) for high in (2, 3, 5, 14)] for _ in range(rows)]
    feats = np.stack([picture(*((a[i], b[i], c[i] + 9 * i, d[i]) for i in range(2))) for a, b, c, d in draw])
    stream = Stream(feats=feats, weight=np.ones((rows, 1), np.float32), kind="pixels")
    return Batch(streams={"pixels": stream}, visibility={}, row_id=np.arange(rows, dtype=np.int64))


def run(structure: Structure, state: State, method: str, *args) -> np.ndarray:
    """A method of the model with these arrays, compiled: op by op it takes minutes."""
    call = jax.jit(lambda p, v, args: getattr(structure.merge(p, v), method)(*args))
    return jax.tree.map(np.asarray, call(state["params"], state["variables"], args))


@pytest.fixture(scope="module")
def trained() -> tuple[Structure, State, list[dict[str, float]]]:
    with jax.set_mesh(Mesh.Config().build(jax.devices()[:1])):
        structure = Structure(MODEL.build, seed=0)
        objective = Autoencode.Config().build()
        optimizer = Optimizer.Config(learning_rate=0.05, warmup=5, weight_decay=0.0).build(150)
        state = tiny.state(structure, optimizer)
        step = make_step(structure, objective, optimizer, seed=0, ema=None)
        told = []
        for i in range(150):
            state, values = step(state, place(pictures(16, i)))
            told.append({name: float(value) for name, value in values.items()})
        return structure, state, told


def test_training_explains_pictures_with_one_place_a_thing(trained) -> None:
    structure, state, told = trained
    assert told[-1]["psnr"] > told[5]["psnr"] + 10
    assert told[-1]["perplexity/mask"] > 1.5 and told[-1]["perplexity/colour"] > 2.5
    seen = pictures(16, 999).streams["pixels"].feats
    codes = run(structure, state, "encode", seen)
    assert codes.shape == (16, 4, 4, 4) and codes.dtype == np.int32
    painted = codes[..., 1] > 0
    assert np.array_equal(painted, codes[..., 0] > 0) and painted.sum() == pytest.approx(32, abs=3)
    off = run(structure, state, "decode", codes) - seen
    assert np.mean(np.square(off)) < 0.1 * np.mean(np.square(seen - GROUND))


def test_masks_do_not_depend_on_colour_and_move_with_what_they_show(trained) -> None:
    structure, state, _ = trained
    there = [(kind, 0, 5, 5) for kind in (0, 1)]

    def codes_of(ink: int, columns: int) -> np.ndarray:
        moved = [picture((kind, ink, row, column + columns)) for kind, _, row, column in there]
        return run(structure, state, "encode", np.stack(moved))

    black = codes_of(0, 0)
    for ink in (1, 2):
        other = codes_of(ink, 0)
        assert np.array_equal(other[..., 1], black[..., 1])
        assert (other[..., 0] != black[..., 0])[black[..., 0] > 0].all()
    assert not np.array_equal(black[0], black[1])
    for columns in (2, 4):  # the search looks at every other centre first
        moved = codes_of(0, columns)
        for before, after in zip(black, moved, strict=True):
            (was,), (now,) = (np.argwhere(codes[..., 1] > 0) for codes in (before, after))
            x = [4 * at[1] + codes[tuple(at)][3] for at, codes in ((was, before), (now, after))]
            assert x[1] - x[0] == columns and np.array_equal(after[tuple(now)][:3], before[tuple(was)][:3])


def test_the_first_round_paints_what_a_search_over_all_codes_finds() -> None:
    """Float64 by brute force, with random codebooks: place by place, mask by mask, pixel by pixel."""
    c = GainShapeVQ.Config(patch=2, side=4, masks=5, colours=3, worth=0.1, rounds=1)
    rng = np.random.default_rng(0)
    model = c.build(nnx.Rngs(0))
    model.masks[...] = jnp.asarray(rng.uniform(0.1, 1, (5, 4, 4)), jnp.float32)
    model.colours.codebook[...] = jnp.asarray(rng.normal(size=(3, 3)), jnp.float32)
    masks, colours, _ = (np.asarray(part, np.float64) for part in model.codebooks())
    given = np.zeros((1, 4, 4, 4), np.int32)
    given[0, 1, 1], given[0, 3, 2] = (1, 2, 1, 2), (3, 5, 2, 2)
    seen = np.asarray(jax.jit(model.decode)(given), np.float64) + rng.normal(size=(1, 8, 8, 3)) * 0.1
    around = np.pad(seen[0], ((2, 2), (2, 2), (0, 0)))
    gain, found = np.zeros((4, 4)), np.zeros((4, 4, 4), int)
    for i, j in np.ndindex(4, 4):
        best = -np.inf
        for row, column, number in np.ndindex(2, 2, 5):
            y, x, mask = 2 * i + row, 2 * j + column, masks[number]
            window = around[y : y + 4, x : x + 4]
            colour = np.einsum("hwc,hw->c", window, mask) / np.sum(mask**2)
            explained = np.sum(np.square(mask)) * np.sum(np.square(colour))
            score = explained - (np.sum(mask * np.sum(np.square(window), axis=2)) - explained)
            if score > best:
                best, nearest = score, int(np.argmin(np.sum(np.square(colours - colour), axis=1)))
                painted = mask[:, :, None] * colours[nearest]
                gain[i, j] = np.sum(np.square(window)) - np.sum(np.square(window - painted))
                found[i, j] = nearest + 1, number + 1, row + 1, column + 1
    around = np.pad(gain, 1, constant_values=-np.inf)
    wins = np.array([[gain[i, j] == around[i : i + 3, j : j + 3].max() for j in range(4)] for i in range(4)])
    expected = np.where((wins & (gain > 0.1))[..., None], found, 0)
    codes = np.asarray(jax.jit(model.encode)(seen.astype(np.float32)))[0]
    assert (expected > 0).any() and np.array_equal(codes, expected)


def test_places_that_do_not_overlap_give_their_codes_back() -> None:
    c = GainShapeVQ.Config(patch=4, side=4, stride=4, masks=5, colours=3, worth=0.1, rounds=1)
    rng = np.random.default_rng(0)
    model = c.build(nnx.Rngs(0))
    model.masks[...] = jnp.asarray(rng.uniform(0.1, 1, (5, 4, 4)), jnp.float32)
    model.colours.codebook[...] = jnp.asarray(rng.normal(size=(3, 3)), jnp.float32)
    codes = np.stack([rng.integers(1, size + 1, (2, 3, 4)) for size in (3, 5)], axis=-1)
    codes[0, 1, 2] = 0
    pixels = jax.jit(model.decode)(codes)
    assert pixels.shape == (2, 12, 16, 3) and not np.any(np.asarray(pixels)[0, 4:8, 8:12])
    assert np.array_equal(jax.jit(model.encode)(pixels), codes)


def test_rows_without_a_picture_do_not_count() -> None:
    structure = Structure(MODEL.build, seed=0)
    params, variables = (tiny.drawn(part) for part in structure.abstract())
    evaluate = make_evaluation(structure, Autoencode.Config().build())
    full = pictures(4, 0)
    stream = full.streams["pixels"]
    feats = np.concatenate([stream.feats, np.full_like(stream.feats, 0.3)])
    weight = np.concatenate([stream.weight, np.zeros_like(stream.weight)])
    more = Batch(
        streams={"pixels": dataclasses.replace(stream, feats=feats, weight=weight)}, visibility={}, row_id=np.arange(8)
    )
    alone, beside = (evaluate(params, variables, place(batch)).figures() for batch in (full, more))
    assert alone.keys() == beside.keys()
    for name in alone:
        assert float(mean(alone[name])) == pytest.approx(float(mean(beside[name])), rel=1e-5), name
    empty = dataclasses.replace(stream, weight=np.zeros_like(stream.weight))
    nothing = evaluate(params, variables, place(dataclasses.replace(full, streams={"pixels": empty})))
    assert all(float(mean(pair)) == 0.0 for pair in nothing.figures().values())


def test_rows_without_a_picture_leave_the_codebooks_alone(trained) -> None:
    structure, state, _ = trained
    stream = pictures(4, 0).streams["pixels"]
    feats = np.concatenate([stream.feats, np.random.default_rng(0).uniform(-1, 1, stream.feats.shape)])
    key = jax.random.key(0)

    def after(feats: np.ndarray, weight: list[float]) -> dict:
        pixels = jnp.asarray(feats, jnp.float32)
        codes = run(structure, state, "encode", pixels)
        call = jax.jit(lambda p, v, *args: structure.merge(p, v).follow(*args, 0.9))
        return call(state["params"], state["variables"], key, pixels, codes, jnp.asarray(weight))

    alone, beside = after(stream.feats, [1.0] * 4), after(feats, [1.0] * 4 + [0.0] * 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), alone, beside)


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
    nothing = quantizer.follow(jax.random.key(0), z, code, jnp.zeros(40), 0.9)
    assert np.array_equal(nothing["codebook"], quantizer.codebook[...])
