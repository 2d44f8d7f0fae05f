"""The training step: repeatable to the bit, and not harmed by gradients that are no numbers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmgpt.core.stream import Batch
from mmgpt.dist.axes import ShardingError
from mmgpt.dist.mesh import Mesh
from mmgpt.kernels.attention import api
from mmgpt.kernels.attention.cases import causal
from mmgpt.objectives.next_token import NextToken
from mmgpt.objectives.objective import Loss
from mmgpt.train.optimizer import Optimizer
from mmgpt.train.state import Structure, abstract
from mmgpt.train.step import make_evaluation, make_step, place
from tests import tiny


class Fragile:
    """Next token, with NaN in the loss where a batch asks for it by its first row's number."""

    def __init__(self) -> None:
        self.inner = NextToken.Config().fit(tiny.grammar().vocabulary).build()
        self.coefficients = self.inner.coefficients

    def corrupt(self, key: jax.Array, batch: Batch) -> Batch:
        return batch

    def loss(self, model: Any, batch: Batch, key: jax.Array | None) -> Loss:
        loss = self.inner.loss(model, batch, key)
        total, weight = loss.terms["next_token"]
        broken = jnp.where(batch.row_id[0] == 666, jnp.nan, 1.0)
        return loss._replace(terms=loss.terms | {"next_token": (total * broken, weight)})


@pytest.fixture(scope="module")
def made():
    with jax.set_mesh(Mesh.Config().build(jax.devices()[:1])):
        structure = Structure(tiny.decoder(dropout=0.1).build, seed=0)
        optimizer = Optimizer.Config(learning_rate=1e-2, warmup=2).build(20)
        step = make_step(structure, Fragile(), optimizer, seed=0, ema=0.9)
        yield structure, optimizer, step, Fragile()


def fresh(made) -> Any:
    return tiny.state(made[0], made[1], ema=True)


def rows(seed: int, first: int = 0) -> Batch:
    batch = tiny.batch(4, 64, seed)
    return place(Batch(streams=batch.streams, visibility=batch.visibility, row_id=batch.row_id + first))


def test_two_runs_give_the_same_losses_and_state_bit_for_bit(made) -> None:
    runs = []
    for _ in range(2):
        state, losses = fresh(made), []
        for i in range(5):
            state, values = made[2](state, rows(i))
            losses.append(float(values["loss"]))
        runs.append((losses, jax.device_get(state)))
    assert runs[0][0] == runs[1][0] and runs[0][0][-1] < runs[0][0][0]
    assert jax.tree.all(jax.tree.map(np.array_equal, runs[0][1], runs[1][1]))
    assert int(runs[0][1]["step"]) == 5


def test_gradients_that_are_not_finite_leave_all_as_it_was(made) -> None:
    state, _ = made[2](fresh(made), rows(0))
    before = jax.device_get(state)
    state, values = made[2](state, rows(1, first=666))
    after = jax.device_get(state)
    assert float(values["skipped"]) == 1.0 and not np.isfinite(values["loss"])
    assert int(after.pop("step")) == int(before.pop("step")) + 1
    assert set(after) == {"params", "variables", "optimizer", "ema"}
    assert jax.tree.all(jax.tree.map(np.array_equal, after, before))
    _, values = made[2](state, rows(2))
    assert float(values["skipped"]) == 0.0 and np.isfinite(values["loss"])


def test_the_average_follows_the_parameters(made) -> None:
    state = fresh(made)
    before = jax.device_get(state["ema"])
    state, _ = made[2](state, rows(0))
    expected = jax.tree.map(lambda old, now: 0.9 * old + 0.1 * np.asarray(now), before, state["params"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), jax.device_get(state["ema"]), expected
    )


def test_values_that_are_told(made) -> None:
    _, values = made[2](fresh(made), rows(0))
    total = float(values["next_token"])
    assert float(values["loss"]) == pytest.approx(total, rel=1e-6)
    assert float(values["learning_rate"]) == float(made[1].schedule(0))
    assert float(values["gradient_norm"]) > 0
    assert {"loss/text", "loss/image", "loss/video", "accuracy/text"} <= values.keys()


def test_evaluation_drops_nothing_and_adds_up(made) -> None:
    state = fresh(made)
    evaluate = make_evaluation(made[0], made[3])
    first, second = (evaluate(state["params"], {}, rows(1)).terms["next_token"] for _ in range(2))
    assert float(first[0]) == float(second[0])
    assert float(first[1]) == pytest.approx(float(np.sum(tiny.batch(4, 64, 1).streams["tokens"].weight)))


def test_the_abstract_state_is_the_states(made) -> None:
    shapes = abstract(made[0], made[1], True)
    state = fresh(made)
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), shapes, state))
    assert all(isinstance(leaf.sharding, jax.NamedSharding) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("context", ["gather", "ring"])
def test_devices_that_share_rows_take_the_same_step(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 1,024 positions in 8 units, whose order evens out the devices' shares."""
    monkeypatch.setattr(api, "DENSE_PAIRS", 0)
    batch = dataclasses.replace(tiny.batch(2, 1024, documents_a_row=60), visibility={"tokens": causal(2, 1024)})
    values = []
    for count in (1, 4):
        with jax.set_mesh(Mesh.Config(fsdp=1, context=count).build(jax.devices()[:count])):
            structure = Structure(tiny.decoder(context=context).build, seed=0)
            optimizer = Optimizer.Config(learning_rate=1e-2, warmup=2).build(20)
            objective = NextToken.Config().fit(tiny.grammar().vocabulary).build()
            placed = place(batch)
            assert np.array_equal(placed.streams["tokens"].ids, batch.streams["tokens"].ids) == (count == 1)
            state = tiny.state(structure, optimizer)
            values.append(make_step(structure, objective, optimizer, seed=0, ema=None)(state, placed)[1])
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose(float(values[1][name]), float(values[0][name]), rtol=1e-5)


def test_rows_that_do_not_divide_over_devices_are_told() -> None:
    with (
        jax.set_mesh(Mesh.Config(fsdp=1, context=3).build(jax.devices()[:3])),
        pytest.raises(ShardingError, match=r"'seq' of 64 does not divide over 3 devices \(context\)"),
    ):
        place(tiny.batch(4, 64))
