"""The pure training step: loss, gradients, guard, update."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmgpt.core.stream import Batch
from mmgpt.dist import axes as rules
from mmgpt.dist import compiler
from mmgpt.kernels.attention.balance import balanced
from mmgpt.objectives.objective import Loss, Objective, mean, total
from mmgpt.train.optimizer import Optimizer
from mmgpt.train.state import State, Structure

StepMetrics = dict[str, jax.Array]


def place(batch: Batch, parts: int = 1) -> Batch:
    """A host's rows, one of `parts` of the global batch, as global arrays: rows over the batch axes, positions over
    the sequence axis, in the order that gives each device of that axis as much attention to do."""
    batch = balanced(batch, rules.ways("seq", jax.sharding.get_mesh()))

    def put(path: Any, leaf: np.ndarray) -> jax.Array:
        name = path[-1].name if isinstance(path[-1], jax.tree_util.GetAttrKey) else ""
        if leaf.dtype == np.int64:
            leaf = leaf.astype(np.int32)
        if leaf.ndim == 4:
            axes = "batch height width channels"
        elif name in ("index", "key_island"):
            axes = "batch keys"
        else:
            axes = "batch" if leaf.shape[1:] == (1,) else " ".join(("batch", "seq", "embed")[: leaf.ndim])
        whole = (leaf.shape[0] * parts, *leaf.shape[1:])
        sharding = rules.sharding(axes, rules.ACT, whole[: len(axes.split())], "batch")
        return jax.make_array_from_process_local_data(sharding, leaf, whole)

    return jax.tree.map_with_path(put, batch)


def make_step(
    structure: Structure, objective: Objective, optimizer: Optimizer, *, seed: int, ema: float | None
) -> Callable[[State, Batch], tuple[State, StepMetrics]]:
    """`step(state, batch) -> (state, metrics)`, jitted, the old state's memory given to the new one.

    A step whose gradients are not finite leaves every array but the step counter as it was ("skipped" is then 1).
    """

    def step(state: State, batch: Batch) -> tuple[State, StepMetrics]:
        key = jax.random.fold_in(jax.random.key(seed), state["step"])
        corrupt_key, drop_key = jax.random.split(key)
        corrupted = objective.corrupt(corrupt_key, batch)

        def differentiated(params: Any) -> tuple[jax.Array, Loss]:
            loss = objective.loss(structure.merge(params, state["variables"]), corrupted, drop_key)
            return total(loss, objective.coefficients), loss

        (value, loss), grads = jax.value_and_grad(differentiated, has_aux=True)(state["params"])
        norm = optax.tree.norm(grads)
        params, moments = optimizer.update(grads, state["optimizer"], state["params"])
        new: State = {
            "params": params,
            "variables": state["variables"] if loss.variables is None else loss.variables,
            "optimizer": moments,
        }
        if ema is not None:
            decay = ema
            new["ema"] = jax.tree.map(lambda old, now: decay * old + (1.0 - decay) * now, state["ema"], params)
        finite = jnp.isfinite(norm) & jnp.isfinite(value)
        kept = jax.tree.map(lambda now, old: jnp.where(finite, now, old), new, {k: state[k] for k in new})
        kept["step"] = state["step"] + 1
        metrics = {name: mean(pair) for name, pair in loss.figures().items()}
        metrics |= {
            "loss": value,
            "gradient_norm": norm,
            "skipped": 1.0 - finite.astype(jnp.float32),
            "learning_rate": jnp.asarray(optimizer.schedule(state["step"]), jnp.float32),
        }
        return kept, metrics

    return jax.jit(step, donate_argnums=0, compiler_options=compiler.options())


def make_evaluation(structure: Structure, objective: Objective) -> Callable[[Any, Any, Batch], Loss]:
    """`evaluate(params, variables, batch) -> Loss`, jitted; its sums, weights and counts add up over batches."""

    def evaluate(params: Any, variables: Any, batch: Batch) -> Loss:
        corrupted = objective.corrupt(jax.random.key(0), batch)
        return objective.loss(structure.merge(params, variables), corrupted, None)

    return jax.jit(evaluate, compiler_options=compiler.options())
