"""The optimizer beside plain optax, its schedules, and what it decays."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from mmgpt import presets
from mmgpt.core.config import ConfigError
from mmgpt.dist.mesh import Mesh
from mmgpt.train.checkpoint import Checkpoints
from mmgpt.train.optimizer import Adafactor, Group, Grouped, Muon, Optimizer
from mmgpt.train.state import Structure, abstract
from tests import tiny


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(Mesh.Config().build(jax.devices()[:1])):
        yield


def tree(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = {"mlp": {"gate": (4, 6)}, "norm": {"scale": (2, 4)}, "first_bias": (6,), "head": (4, 8)}
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def test_steps_equal_plain_adamw() -> None:
    config = Optimizer.Config(learning_rate=1e-2, warmup=3, weight_decay=0.2, clip=0.5)
    ours, params = config.build(20), tree(0)
    mask = {"mlp": {"gate": True}, "norm": {"scale": False}, "first_bias": False, "head": True}
    theirs = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(ours.schedule, b1=config.b1, b2=config.b2, eps=config.epsilon, weight_decay=0.2, mask=mask),
    )
    state, their_state, their_params = ours.init(params), theirs.init(params), params
    step, their_step = jax.jit(ours.update), jax.jit(theirs.update)
    for i in range(20):
        grads = jax.tree.map(lambda x, i=i: x * (1 + i), tree(i + 1))
        params, state = step(grads, state, params)
        updates, their_state = their_step(grads, their_state, their_params)
        their_params = optax.apply_updates(their_params, updates)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), params, their_params)


def test_the_state_is_named_arrays_of_the_parameters_shapes() -> None:
    optimizer, params = Optimizer.Config(warmup=1).build(5), tree(0)
    state = optimizer.init(params)
    assert all(isinstance(name, str) and isinstance(leaf, jax.Array) for name, leaf in state.items())
    for moment in ("mu", "nu"):
        shapes = {n.partition(f"{moment}/")[2]: s.shape for n, s in state.items() if f"{moment}/" in n}
        assert shapes == {"mlp/gate": (4, 6), "norm/scale": (2, 4), "first_bias": (6,), "head": (4, 8)}
    assert optimizer.update(tree(1), state, params)[1].keys() == state.keys()


@pytest.mark.parametrize("kind", [Optimizer.Config, Adafactor])
def test_gains_and_biases_do_not_decay(kind: type[Optimizer.Config]) -> None:
    optimizer, params = kind(learning_rate=0.1, warmup=0, schedule="constant").build(5), tree(0)
    zero = jax.tree.map(jnp.zeros_like, params)
    after, _ = optimizer.update(zero, optimizer.init(params), params)
    same = jax.tree.map(np.array_equal, after, params)
    assert same == {"mlp": {"gate": False}, "norm": {"scale": True}, "first_bias": True, "head": False}


def test_muon_turns_stacked_matrices_and_steps_the_rest_by_adam_with_nesterov() -> None:
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    params = {
        "stack": {"stacked": {"gate": draw(2, 6, 8), "out": draw(2, 6, 4), "scale": draw(2, 4)}},
        "head": draw(4, 8),
    }
    grads = jax.tree.map(lambda x: x * 0.1, params)
    settings = {"learning_rate": 0.01, "warmup": 0, "schedule": "constant", "weight_decay": 0.0}
    optimizer = Muon(**settings).build(10)
    after, _ = optimizer.update(grads, optimizer.init(params), params)
    turned = jax.tree.map(lambda now, old: np.asarray(now - old) / 0.01, after, params)
    adam = optax.scale_by_adam(0.9, 0.95, 1e-8, nesterov=True)
    plain, _ = adam.update(grads, adam.init(params))
    np.testing.assert_allclose(turned["head"], -plain["head"], atol=1e-4)
    np.testing.assert_allclose(turned["stack"]["stacked"]["scale"], -plain["stack"]["stacked"]["scale"], atol=1e-4)
    for name, shape in (("gate", (2, 6, 8)), ("out", (2, 6, 4))):
        step = turned["stack"]["stacked"][name].reshape(shape)
        values = np.linalg.svd(step, compute_uv=False)
        assert values.max() / values.min() < 2.5  # about orthogonal: Newton-Schulz stops early
        assert np.sum(step * np.asarray(grads["stack"]["stacked"][name]).reshape(shape)) < 0  # downhill


def layered(seed: int) -> dict[str, Any]:
    """Weights of five layers, more than some of their dimensions; gains; and a table that no layer holds."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    layers = {"gate": draw(5, 6, 8), "out": draw(5, 4, 3, 8), "scale": draw(5, 6)}
    return {"stack": {"stacked": layers}, "head": draw(6, 9), "thin": draw(9, 2)}


def unstacked(tree: dict[str, Any]) -> dict[str, Any]:
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], tree["stack"]["stacked"]) for i in range(5)]
    return tree | {"stack": layers}


@pytest.mark.parametrize("b1", [0.0, 0.9])
def test_adafactor_takes_the_steps_of_optax_in_each_layer(b1: float) -> None:
    config = Adafactor(
        learning_rate=0.05, warmup=0, schedule="constant", weight_decay=0.0, clip=1e9, b1=b1, smallest=4, b2=1.0
    )
    ours, params = config.build(20), layered(0)
    theirs = optax.adafactor(
        ours.schedule,
        min_dim_size_to_factor=4,
        multiply_by_parameter_scale=False,
        momentum=b1 or None,
        dtype_momentum=jnp.bfloat16,
    )
    their_params = unstacked(params)
    state, their_state = ours.init(params), theirs.init(their_params)
    step, their_step = jax.jit(ours.update), jax.jit(theirs.update)
    for i in range(20):
        grads = jax.tree.map(lambda x, i=i: x * (1 + i % 3), layered(i + 1))
        params, state = step(grads, state, params)
        updates, their_state = their_step(unstacked(grads), their_state, their_params)
        their_params = optax.apply_updates(their_params, updates)
        # a first moment is rounded to bfloat16 here before the learning rate, there after it
        atol = 1e-5 if b1 == 0.0 else 0.05 * (i + 1) * 2**-7
        jax.tree.map(
            lambda a, b, atol=atol: np.testing.assert_allclose(a, b, rtol=0, atol=atol), unstacked(params), their_params
        )


def test_adafactor_caps_the_decay_of_second_moments() -> None:
    config = Adafactor(learning_rate=1.0, warmup=0, schedule="constant", weight_decay=0.0, clip=1e9, b2=0.5)
    optimizer, params = config.build(50), {"head": jnp.zeros((2, 2))}
    state = optimizer.init(params)
    for _ in range(20):
        params, state = optimizer.update({"head": jnp.ones((2, 2))}, state, params)
    before = params
    params, state = optimizer.update({"head": jnp.full((2, 2), 3.0)}, state, params)
    assert state["1/inner_states/rest/inner_state/0/v/head"] == pytest.approx(0.5 * 1.0 + 0.5 * 9.0)
    assert before["head"] - params["head"] == pytest.approx(1.0)  # 3 / sqrt(5), but for the clipping


@pytest.mark.parametrize(("b1", "share"), [(0.0, 0.001), (0.9, 0.501)])
def test_adafactor_holds_little_for_a_weight(b1: float, share: float) -> None:
    model = presets.preset("emu3_8b").model
    structure = Structure(model.replace(vocab=184_622).build, seed=0)
    state = abstract(structure, Adafactor(b1=b1).build(1000), ema=False)
    held, parameters = (
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state[kind]))
        for kind in ("optimizer", "params")
    )
    assert parameters > 8e9 * 4
    assert held < share * parameters


def test_adafactors_state_comes_back_on_another_mesh(tmp_path: Path) -> None:
    optimizer = Adafactor(warmup=1, b1=0.9, smallest=8).build(5)

    def made(mesh: Mesh.Config, count: int, seed: int) -> Any:
        with jax.set_mesh(mesh.build(jax.devices()[:count])):
            state = tiny.state(Structure(tiny.decoder(scan=True, kv_heads=4).build, seed=seed), optimizer)
            return state | {"optimizer": {k: v + i for i, (k, v) in enumerate(state["optimizer"].items())}}

    saved = made(Mesh.Config(fsdp=2, context=2, tensor=2), 8, 0)
    with Checkpoints.Config().build(tmp_path) as checkpoints:
        checkpoints.save(3, saved, 24, {})
    other = made(Mesh.Config(replica=2, fsdp=2), 4, 1)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), other)
    with Checkpoints.Config().build(tmp_path) as checkpoints:
        found = checkpoints.restore(shapes)
    assert found is not None
    assert found.state["optimizer"].keys() == saved["optimizer"].keys()
    for name, leaf in saved["optimizer"].items():
        assert np.array_equal(found.state["optimizer"][name], leaf), name
        assert found.state["optimizer"][name].sharding == other["optimizer"][name].sharding


def test_each_group_has_its_own_optimizer_and_clipped_norm_and_a_frozen_one_no_moments() -> None:
    mine = Optimizer.Config(learning_rate=1e-3, warmup=2, b1=0.5, b2=0.9, weight_decay=0.0, clip=0.1)
    config = Grouped(
        learning_rate=1e-2,
        warmup=3,
        weight_decay=0.2,
        clip=0.5,
        groups=(Group(path="mlp", optimizer=mine), Group(path="norm/scale")),
    )
    ours, params = config.build(20), tree(0)
    state, start, step = ours.init(params), params, jax.jit(ours.update)
    moments = [name for name in state if "/mu/" in name]
    assert sorted(name.split("/mu/")[1] for name in moments) == ["first_bias", "head", "mlp/gate"]
    rest = Optimizer.Config(learning_rate=1e-2, warmup=3, weight_decay=0.2, clip=0.5).build(20)
    alone = {"mlp": mine.build(20), "rest": rest}
    parts: dict[str, Any] = {"mlp": {"mlp": params["mlp"]}, "rest": {k: params[k] for k in ("first_bias", "head")}}
    states = {name: optimizer.init(parts[name]) for name, optimizer in alone.items()}
    for i in range(5):
        grads = jax.tree.map(lambda x, i=i: x * (1 + i), tree(i + 1))
        params, state = step(grads, state, params)
        for name, optimizer in alone.items():
            of_part = {k: grads[k] for k in parts[name]}
            parts[name], states[name] = optimizer.update(of_part, states[name], parts[name])
    assert np.array_equal(params["norm"]["scale"], start["norm"]["scale"])
    for name, part in (parts["mlp"] | parts["rest"]).items():
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), params[name], part)
        assert not jax.tree.all(jax.tree.map(np.array_equal, params[name], start[name]))


def test_a_group_of_nothing_is_told() -> None:
    optimizer = Grouped(warmup=1, groups=(Group(path="mlp"), Group(path="ml"))).build(5)
    with pytest.raises(ConfigError, match=r"no parameter lies below ml; the model has first_bias, head, mlp, norm"):
        optimizer.init(tree(0))
    with pytest.raises(ConfigError, match=r"optimizer\.warmup 7 is not shorter"):
        Grouped(warmup=1, groups=(Group(path="mlp", optimizer=Optimizer.Config(warmup=7)),)).build(5)


@pytest.mark.parametrize("layers", [4, 3])
def test_muon_turns_the_same_on_several_devices(layers: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((layers, 6, 8)).astype(np.float32)
    optimizer = Muon(learning_rate=0.1, warmup=0).build(10)

    def stepped(mesh: Mesh.Config, count: int) -> np.ndarray:
        with jax.set_mesh(mesh.build(jax.devices()[:count])):
            stored = jax.device_put(values, jax.sharding.NamedSharding(jax.sharding.get_mesh(), P(None, "fsdp")))
            params = {"stacked": {"gate": stored}}
            state = optimizer.init(params)
            step = jax.jit(optimizer.update)
            for _ in range(3):
                params, state = step(jax.tree.map(lambda x: x * 0.1, params), state, params)
            assert jax.typeof(params["stacked"]["gate"]).sharding.spec == P(None, "fsdp", None)
            return np.asarray(params["stacked"]["gate"])

    one = stepped(Mesh.Config(), 1)
    assert np.abs(one - values).max() > 0.1
    np.testing.assert_allclose(stepped(Mesh.Config(), 2), one, rtol=0, atol=1e-5)
    np.testing.assert_allclose(stepped(Mesh.Config(replica=2), 4), one, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ("cosine", {0: 0.0, 5: 0.5, 10: 1.0, 55: 0.55, 100: 0.1}),
        ("linear", {0: 0.0, 5: 0.5, 10: 1.0, 55: 0.55, 100: 0.1}),
        ("stable", {0: 0.0, 5: 0.5, 10: 1.0, 55: 1.0, 80: 1.0, 90: 0.55, 100: 0.1}),
        ("constant", {0: 0.0, 5: 0.5, 10: 1.0, 55: 1.0, 100: 1.0}),
    ],
)
def test_schedules(schedule: Any, values: dict[int, float]) -> None:
    optimizer = Optimizer.Config(learning_rate=2.0, schedule=schedule, warmup=10, final=0.1).build(100)
    assert {step: pytest.approx(float(optimizer.schedule(step)) / 2.0) for step in values} == values


def test_no_warmup_begins_at_the_peak() -> None:
    assert float(Optimizer.Config(learning_rate=2.0, warmup=0).build(100).schedule(0)) == 2.0


def test_a_warmup_as_long_as_the_run_is_told() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.warmup 100 is not shorter than the run of 100 steps"):
        Optimizer.Config(warmup=100).build(100)
