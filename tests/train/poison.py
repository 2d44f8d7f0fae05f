"""Data that harms: rows whose loss is no number, or many times what it should be, whenever they are trained on."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmgpt.core.stream import Batch
from mmgpt.objectives.objective import Loss, Objective
from mmgpt.train import step as steps

SPIKE = 30.0
"""Times the loss of a row that spikes."""
NAN_MARK, SPIKE_MARK = 1 << 29, 1 << 28
"""Added to the number of a poisoned row on its way to the step: which rows those are is no part of the program, so
that all tests share a compiled one."""
MOST = 256


class Poisoned:
    """An objective that is harmed by marked rows."""

    def __init__(self, inner: Objective) -> None:
        self.inner, self.coefficients = inner, inner.coefficients

    def corrupt(self, key: jax.Array, batch: Batch) -> Batch:
        return self.inner.corrupt(key, batch)

    def loss(self, model: Any, batch: Batch, key: jax.Array | None) -> Loss:
        nan, spike = (jnp.any((batch.row_id & mark) > 0) for mark in (NAN_MARK, SPIKE_MARK))
        clean = dataclasses.replace(batch, row_id=batch.row_id & (SPIKE_MARK - 1))
        loss = self.inner.loss(model, clean, key)
        factor = jnp.where(nan, jnp.nan, jnp.where(spike, SPIKE, 1.0))
        terms = {name: (total * factor, weight) for name, (total, weight) in loss.terms.items()}
        return loss._replace(terms=terms)


@jax.jit
def _marked(row_id: jax.Array, nan: jax.Array, spike: jax.Array) -> jax.Array:
    found = (jnp.any(row_id[:, None] == rows[None], axis=1) for rows in (nan, spike))
    return row_id + sum(jnp.where(there, mark, 0) for there, mark in zip(found, (NAN_MARK, SPIKE_MARK), strict=True))


def _padded(rows: Collection[int]) -> np.ndarray:
    return np.array([*rows, *[-2] * (MOST - len(rows))], np.int32)  # no row is -2


def make_step(nan: Collection[int] = (), spike: Collection[int] = ()) -> Callable[..., Any]:
    """`step.make_step` over data with these rows poisoned."""

    def made(structure: Any, objective: Objective, optimizer: Any, **settings: Any) -> Any:
        step = steps.make_step(structure, Poisoned(objective), optimizer, **settings)
        rows = _padded(nan), _padded(spike)

        def poisoned(state: Any, batch: Batch) -> Any:
            return step(state, dataclasses.replace(batch, row_id=_marked(batch.row_id, *rows)))

        return poisoned

    return made
