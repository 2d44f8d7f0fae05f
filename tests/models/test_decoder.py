"""What every model found in mmgpt/models promises, and what a decoder over tokens promises besides."""

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mmgpt.models
from mmgpt.core.config import Config, ConfigError
from mmgpt.core.stream import Batch, Stream, packed_causal
from mmgpt.dist.axes import ShardingError
from mmgpt.dist.mesh import Mesh
from mmgpt.models import ModelConfig
from mmgpt.models.decoder import Decoder
from mmgpt.models.gain_shape_vq import GainShapeVQ
from mmgpt.models.ibq import IBQ
from mmgpt.models.movq import MoVQ
from mmgpt.nn.layers import RopeScaling
from mmgpt.objectives.autoencode import Autoencode
from mmgpt.objectives.next_token import NextToken
from mmgpt.objectives.objective import total
from mmgpt.objectives.vq_gan import VqGan
from mmgpt.train.optimizer import Optimizer
from mmgpt.train.state import Structure
from mmgpt.train.step import make_step, place
from tests import tiny

MESHES = {
    "one": (Mesh.Config(fsdp=1), 1),
    "fsdp=8": (Mesh.Config(fsdp=8), 8),
    "fsdp=4,tensor=2": (Mesh.Config(fsdp=4, tensor=2), 8),
    "fsdp=2,context=2,tensor=2": (Mesh.Config(fsdp=2, context=2, tensor=2), 8),
    "replica=2,fsdp=2,context=2": (Mesh.Config(replica=2, fsdp=2, context=2), 8),
}


def pictures(rows: int, seed: int = 0) -> Batch:
    feats = np.random.default_rng(seed).uniform(-1, 1, (rows, 8, 8, 3)).astype(np.float32)
    stream = Stream(feats=feats, weight=np.ones((rows, 1), np.float32), kind="pixels")
    return Batch(streams={"pixels": stream}, visibility={}, row_id=np.arange(rows, dtype=np.int64))


# One line for each model: a small config, the objective it is trained with, and batches by seed.
EXAMPLES: dict[str, tuple[Config, Any, Callable[[int], Batch]]] = {
    "decoder": (
        tiny.decoder(),
        NextToken.Config().fit(tiny.grammar().vocabulary).build(),
        lambda seed: tiny.batch(8, 64, seed),
    ),
    "gain_shape_vq": (
        GainShapeVQ.Config(patch=4, side=4, masks=16, colours=4, worth=0.5),
        Autoencode.Config().build(),
        lambda seed: pictures(8, seed),
    ),
    "movq": (
        MoVQ.Config(codes=32, channels=16, multiples=(1, 1), blocks=1, attention=(0,), temporal=2),
        VqGan.Config(entropy=0.1, temperature=0.1).build(),
        lambda seed: pictures(8, seed),
    ),
    "ibq": (
        IBQ.Config(codes=32, dim=8, latent=16, channels=16, multiples=(1, 1), blocks=1, attention=(), remat=True),
        VqGan.Config(entropy=0.1, temperature=0.1).build(),
        lambda seed: pictures(8, seed),
    ),
}
every_model = pytest.mark.parametrize("name", sorted(EXAMPLES))


def numbered(rows: int, length: int) -> np.ndarray:
    """Positions `[rows, length, 5]` outside pictures."""
    position = np.zeros((rows, length, 5), np.int32)
    position[..., 0] = np.arange(length)
    return position


def mesh(name: str = "one") -> jax.sharding.Mesh:
    config, devices = MESHES[name]
    return config.build(jax.devices()[:devices])


@pytest.fixture
def one_device():
    with jax.set_mesh(mesh()):
        yield


@functools.cache
def structure(model: Config, mesh_name: str = "one") -> Structure:
    with jax.set_mesh(mesh(mesh_name)):
        return Structure(model.build, seed=0)


def forward(model: Config, params: Any, batch: Batch) -> jax.Array:
    shape = structure(model)
    return jax.jit(lambda params, batch: shape.merge(params, {})(batch))(params, place(batch))


def params_of(model: Config) -> Any:
    return tiny.drawn(structure(model).abstract()[0])


# --- every model


def test_every_model_has_an_example() -> None:
    """A new file in mmgpt/models needs a line in EXAMPLES, and then inherits these tests."""
    files = {p.stem for p in Path(mmgpt.models.__path__[0]).glob("*.py")} - {"__init__"}
    found = {f: importlib.import_module(f"mmgpt.models.{f}") for f in files}
    with_config = {
        f
        for f, module in found.items()
        if any(
            inspect.isclass(c) and c.__module__ == module.__name__ and issubclass(vars(c).get("Config", c), ModelConfig)
            for c in vars(module).values()
        )
    }
    assert with_config == set(EXAMPLES)


@every_model
def test_gradients_are_finite_and_reach_every_parameter(name: str, one_device) -> None:
    model, objective, batches = EXAMPLES[name]
    shape = structure(model)
    params, variables = (tiny.drawn(part) for part in shape.abstract())

    def loss(params: Any, batch: Batch) -> jax.Array:
        return total(objective.loss(shape.merge(params, variables), batch, None), objective.coefficients)

    grads = jax.jit(jax.grad(loss))(params, place(batches(0)))
    assert jax.tree.leaves(grads) or name == "gain_shape_vq"  # whose codebooks follow their batches
    for path, grad in jax.tree.leaves_with_path(grads):
        assert np.isfinite(grad).all(), path
        assert np.abs(grad).max() > 0, f"{jax.tree_util.keystr(path)} has no gradient"


@functools.cache
def losses(name: str, mesh_name: str, steps: int) -> list[float]:
    model, objective, batches = EXAMPLES[name]
    with jax.set_mesh(mesh(mesh_name)):
        shape = structure(model, mesh_name)
        optimizer = Optimizer.Config(learning_rate=3e-3, warmup=2).build(steps)
        state = tiny.state(shape, optimizer)
        step = make_step(shape, objective, optimizer, seed=0, ema=None)
        found = []
        for i in range(steps):
            state, values = step(state, place(batches(i)))
            found.append(float(values["loss"]))
    return found


@pytest.mark.parametrize(
    "mesh_name",
    [pytest.param(m, marks=pytest.mark.slow) if m.startswith("replica") else m for m in MESHES if m != "one"],
)
def test_a_decoders_losses_are_the_same_on_one_and_eight_devices(mesh_name: str) -> None:
    alone = losses("decoder", "one", 20)
    assert alone[-1] < alone[0] - 0.3
    np.testing.assert_allclose(losses("decoder", mesh_name, 20), alone, rtol=0, atol=1e-5)


SLOW_TOKENIZERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("movq", "ibq")]


@pytest.mark.parametrize("name", ["gain_shape_vq", *SLOW_TOKENIZERS])
@pytest.mark.parametrize("mesh_name", ["fsdp=8", "fsdp=2,context=2,tensor=2"])
def test_an_image_tokenizers_losses_are_the_same_on_one_and_eight_devices(mesh_name: str, name: str) -> None:
    """Three steps: where two codes are about as near, rounding chooses another one later on."""
    np.testing.assert_allclose(losses(name, mesh_name, 3), losses(name, "one", 3), rtol=0, atol=1e-5)


@every_model
def test_step_flops_count_the_matmuls(name: str) -> None:
    """Twice the rows, twice the operations; and no less than 6 per parameter of a matmul and position."""
    model, _, batches = EXAMPLES[name]
    one = batches(0)
    twice = jax.tree.map(lambda leaf: np.concatenate([leaf, leaf]), one)
    assert model.step_flops(twice) == 2 * model.step_flops(one) > 0


# --- decoders


VARIANTS = {
    "plain": tiny.decoder(),
    "tied": tiny.decoder(tied=True, qk_norm="none"),
    "scanned": tiny.decoder(scan=True, remat="full"),
    "places in pictures": tiny.decoder(rope_grid=1),
    "embedded places": tiny.decoder(rope_grid=1, places=4),
    "one kv head": tiny.decoder(kv_heads=1, rope_theta=100.0),
    "layer norm per head, normed outputs": tiny.decoder(qk_norm="layer", post_norm=True),
    "stretched": tiny.decoder(rope_scaling=RopeScaling(kind="llama3", factor=4.0, original=32)),
}
variants = pytest.mark.parametrize("model", VARIANTS.values(), ids=VARIANTS)


@pytest.mark.parametrize("model", [VARIANTS["plain"], VARIANTS["scanned"]], ids=["plain", "scanned"])
def test_no_position_sees_the_future_or_another_document(model: Decoder.Config, one_device) -> None:
    """Shown by the gradient of each position's logits by the input embeddings of the others."""
    document = np.array([[0] * 20 + [1] * 18 + [-1] * 10, [0] * 48], np.int32)
    seen = {"tokens": packed_causal(document)}
    shape = structure(model)
    params = params_of(model)
    ids = np.arange(96, dtype=np.int32).reshape(2, 48)  # each id once, so that a row of the embedding is a position
    stream = Stream(ids=ids, position=numbered(2, 48))
    placed = place(Batch(streams={"tokens": stream}, visibility=seen, row_id=np.arange(2)))
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(model.vocab).astype(np.float32)

    def read(table: jax.Array, row: jax.Array, at: jax.Array) -> jax.Array:
        return jnp.sum(shape.merge(params | {"embedding": table}, {})(placed)[row, at] * weight)

    gradient = jax.jit(jax.grad(read))
    for row, at in ((0, 0), (0, 13), (0, 19), (0, 20), (0, 30), (1, 7), (1, 47)):
        reached = np.abs(np.asarray(gradient(params["embedding"], row, at))[:96]).max(axis=1) > 0
        first = 20 if row == 0 and at >= 20 else 0
        expected = np.zeros(96, bool)
        expected[row * 48 + first : row * 48 + at + 1] = True
        assert np.array_equal(reached, expected), (row, at)


def test_scanned_unrolled_and_rematerialised_are_the_same(one_device) -> None:
    batch = place(tiny.batch(2, 64))
    params = params_of(tiny.decoder())
    objective = EXAMPLES["decoder"][1]
    found = {}
    for scan, remat in ((False, "none"), (True, "none"), (True, "full"), (False, "matmuls")):
        shape = structure(tiny.decoder(scan=scan, remat=remat))

        def loss(params: Any, shape=shape) -> jax.Array:
            return total(objective.loss(shape.merge(params, {}), batch, jax.random.key(3)), objective.coefficients)

        found[scan, remat] = jax.jit(jax.value_and_grad(loss))(params)
    value, grads = found.pop((False, "none"))
    for other, other_grads in found.values():
        np.testing.assert_allclose(other, value, rtol=0, atol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6), other_grads, grads)


def test_matmuls_that_remat_keeps_are_not_done_again(one_device) -> None:
    batch = place(tiny.batch(2, 64))
    params = params_of(tiny.decoder())

    def products(remat: str) -> int:
        shape = structure(tiny.decoder(scan=False, remat=remat))
        gradient = jax.grad(lambda params: jnp.sum(shape.merge(params, {})(batch)))
        return str(jax.make_jaxpr(gradient)(params)).count("dot_general[")

    assert products("matmuls") < products("full")


@variants
def test_the_cache_token_by_token_equals_the_full_forward(model: Decoder.Config, one_device) -> None:
    length, given = 24, 9
    seen = packed_causal(np.zeros((2, length), np.int32))
    rng = np.random.default_rng(0)
    position = numbered(2, length)
    position[..., 1:] = rng.integers(0, 5, (2, length, 4))
    stream = Stream(ids=rng.integers(0, model.vocab, (2, length)).astype(np.int32), position=position)
    batch = Batch(streams={"tokens": stream}, visibility={"tokens": seen}, row_id=np.arange(2))
    params = params_of(model)
    expected = forward(model, params, batch)
    shape = structure(model)

    @functools.partial(jax.jit, static_argnums=4)
    def extend(params: Any, ids: jax.Array, caches: Any, slot: jax.Array, T: int):
        module = shape.merge(params, {})
        at = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=slot, slice_size=T, axis=1)
        here = jax.tree.map(lambda leaf: at(jnp.asarray(leaf)), seen)
        key_island = jnp.where(jnp.asarray(seen.index) < slot + T, 0, -1)
        visibility = dataclasses.replace(here, index=jnp.asarray(seen.index), key_island=key_island)
        x, caches = module.extend(module.stack.unstacked(), ids, at(jnp.asarray(position)), visibility, caches, slot)
        return module.logits(x), caches

    caches = jax.jit(lambda: shape.merge(params, {}).caches(2, length))()
    ids, parts = jnp.asarray(stream.ids), []
    logits, caches = extend(params, ids[:, :given], caches, jnp.int32(0), given)
    parts.append(logits)
    for at in range(given, length):
        logits, caches = extend(params, ids[:, at : at + 1], caches, jnp.int32(at), 1)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), expected, rtol=0, atol=2e-4)


def test_positions_are_relative(one_device) -> None:
    """A document's logits do not depend on where its numbering begins."""
    batch, model = tiny.batch(2, 64), VARIANTS["places in pictures"]
    params = params_of(model)
    stream = batch.streams["tokens"]
    found = []
    for moved in ((0, 0, 0, 0, 0), (1000, 0, 0, 0, 0), (0, 7, 0, 7, 0), (0, 0, 7, 0, 7)):
        other = dataclasses.replace(stream, position=stream.position + np.array(moved, np.int32))
        found.append(forward(model, params, dataclasses.replace(batch, streams={"tokens": other})))
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=0, atol=1e-3)
    flat = dataclasses.replace(stream, position=stream.position * np.array([1, 0, 1, 0, 1], np.int32))
    without_rows = forward(model, params, dataclasses.replace(batch, streams={"tokens": flat}))
    assert np.abs(without_rows - found[0]).max() > 1e-2


def test_dropout_needs_a_key_and_changes_with_it(one_device) -> None:
    model = tiny.decoder(dropout=0.2, attention_dropout=0.2)
    module = structure(model).merge(params_of(model), {})
    batch = place(tiny.batch(2, 64))
    call = jax.jit(lambda key: module(batch, key=key))
    without, first, second = call(None), call(jax.random.key(0)), call(jax.random.key(1))
    assert np.array_equal(without, call(None)) and np.array_equal(first, call(jax.random.key(0)))
    assert not np.array_equal(first, without) and not np.array_equal(first, second)


def test_bfloat16_computes_near_float32(one_device) -> None:
    params, batch = params_of(tiny.decoder()), tiny.batch(2, 64)
    exact, half = (forward(tiny.decoder(dtype=d), params, batch) for d in ("float32", "bfloat16"))
    assert half.dtype == jnp.float32
    assert 0 < np.abs(half - exact).max() < 0.1


@pytest.mark.slow
def test_fresh_logits_are_of_order_one_at_any_depth_and_the_same_on_every_mesh() -> None:
    for layers in (1, 12):
        model = tiny.decoder(layers=layers, scan=True)
        params = {}
        for name in ("one", "fsdp=4,tensor=2"):
            with jax.set_mesh(mesh(name)):
                params[name] = jax.jit(structure(model, name).fresh)()[0]
        jax.tree.map(np.testing.assert_array_equal, *params.values())
        with jax.set_mesh(mesh("one")):
            logits = forward(model, params["one"], tiny.batch(2, 64))
        assert 0.5 < float(jnp.std(logits)) < 2.0


@pytest.mark.parametrize(
    ("changes", "mesh_name", "parts"),
    [
        ({"kv_heads": 1}, "fsdp=4,tensor=2", ("attention/k", "kv_heads", "1 does not divide over 2")),
        ({"mlp": 33}, "fsdp=4,tensor=2", ("mlp/", "'mlp' of 33 does not divide over 2")),
        ({"embed": 20, "mlp": 36}, "fsdp=8", ("mlp/", "divides over fsdp=8; change the size")),
        ({"vocab": 321}, "fsdp=4,tensor=2", ("embedding", "'vocab' of 321 does not divide over 2")),
    ],
)
def test_a_size_that_does_not_divide_names_the_parameter(changes: dict, mesh_name: str, parts: tuple[str, ...]) -> None:
    with jax.set_mesh(mesh(mesh_name)), pytest.raises(ShardingError) as error:
        Structure(tiny.decoder(**changes).build, seed=0)
    assert all(part in str(error.value) for part in parts), error.value


def test_sizes_that_cannot_be_are_told(one_device) -> None:
    for changes, message in (
        ({"vocab": 0}, "model.vocab is 0"),
        ({"layers": -1, "embed": 0}, "model.layers is -1, model.embed is 0; sizes are 1 or more"),
        ({"dropout": 2.0}, "model.dropout is 2.0"),
        ({"kv_heads": 3}, "model.heads 4 is not a multiple of model.kv_heads 3"),
        ({"head_dim": 7}, "model.head_dim 7 must be even"),
        ({"rope_grid": 2}, "above 4 x model.rope_grid 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            tiny.decoder(**changes).build(nnx.Rngs(0))
