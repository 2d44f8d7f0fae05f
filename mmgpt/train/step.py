"""The pure training step: loss, gradients, guard, update."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmgpt.core.config import ConfigError
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
        if leaf.dtype == np.int64:
            leaf = leaf.astype(np.int32)
        whole = (leaf.shape[0] * parts, *leaf.shape[1:])
        return jax.make_array_from_process_local_data(_laid_out(path, whole), leaf, whole)

    return jax.tree.map_with_path(put, batch)


def placed_shapes(batch: Batch, rows: int) -> Batch:
    """The shapes and shardings of a global batch of so many rows, each like those of `batch`."""

    def shaped(path: Any, leaf: np.ndarray) -> jax.ShapeDtypeStruct:
        whole = (rows, *leaf.shape[1:])
        dtype = np.int32 if leaf.dtype == np.int64 else leaf.dtype
        return jax.ShapeDtypeStruct(whole, dtype, sharding=_laid_out(path, whole))

    return jax.tree.map_with_path(shaped, batch)


def _laid_out(path: Any, shape: tuple[int, ...]) -> jax.NamedSharding:
    """The sharding of a batch's array by its name and shape."""
    name = path[-1].name if isinstance(path[-1], jax.tree_util.GetAttrKey) else ""
    if len(shape) == 4:
        axes = "batch height width channels"
    elif name in ("index", "key_island"):
        axes = "batch keys"
    else:
        axes = "batch" if shape[1:] == (1,) else " ".join(("batch", "seq", "embed")[: len(shape)])
    return rules.sharding(axes, rules.ACT, shape[: len(axes.split())], "batch")


def make_step(
    structure: Structure,
    objective: Objective,
    optimizer: Optimizer,
    *,
    seed: int,
    ema: float | None,
    microbatches: int = 1,
) -> Callable[[State, Batch], tuple[State, StepMetrics]]:
    """`step(state, batch) -> (state, metrics)`, jitted, the old state's memory given to the new one.

    The batch goes through the model in `microbatches` parts, each a part of every device's rows; the loss is that of
    the whole. A step whose gradients are not finite leaves every array but the step counter as it was ("skipped" is
    then 1).
    """

    def step(state: State, batch: Batch) -> tuple[State, StepMetrics]:
        key = jax.random.fold_in(jax.random.key(seed), state["step"])
        corrupt_key, drop_key = jax.random.split(key)
        parts = _parts(objective.corrupt(corrupt_key, batch), microbatches)
        keys = drop_key[None] if microbatches == 1 else jax.random.split(drop_key, microbatches)

        def losses(params: Any, part: Batch, key: jax.Array) -> Loss:
            return objective.loss(structure.merge(params, state["variables"]), part, key)

        value, loss, grads = _differentiated(losses, objective.coefficients, state["params"], parts, keys)
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


def _parts(batch: Batch, count: int) -> Batch:
    """The rows in `count` parts, as a new first axis: each has a part of every device's rows, so that none moves."""
    ways = rules.ways("batch", jax.sharding.get_abstract_mesh())

    def split(leaf: jax.Array) -> jax.Array:
        rows, *rest = leaf.shape
        if rows % (ways * count):
            raise ConfigError(
                f"data.batch_rows {rows} does not divide into microbatches={count} on {ways} devices; give a multiple "
                f"of {ways * count}, or another number of either."
            )
        spec = jax.typeof(leaf).sharding.spec
        whole = jax.P(spec[0], None, None, *spec[1:])
        apart = jnp.reshape(leaf, (ways, count, rows // ways // count, *rest), out_sharding=whole)
        apart = jnp.moveaxis(apart, 1, 0)
        return jnp.reshape(apart, (count, rows // count, *rest), out_sharding=jax.P(None, *spec))

    return jax.tree.map(lambda x: x[None], batch) if count == 1 else jax.tree.map(split, batch)


def _differentiated(
    losses: Callable[[Any, Batch, jax.Array], Loss],
    coefficients: dict[str, float],
    params: Any,
    parts: Batch,
    keys: jax.Array,
) -> tuple[jax.Array, Loss, Any]:
    """The total, the loss and the gradients of all parts of a batch: `(value, loss, gradients)`.

    Each term is divided by its weight in the whole batch, which a first pass over the parts adds up: what it makes
    besides weights is never used, and so never computed.
    """
    count = keys.shape[0]
    if count == 1:
        only = jax.tree.map(lambda x: x[0], (parts, keys))

        def whole(params: Any) -> tuple[jax.Array, Loss]:
            loss = losses(params, *only)
            return total(loss, coefficients), loss

        (value, loss), grads = jax.value_and_grad(whole, has_aux=True)(params)
        return value, loss, grads

    def weighed(sums: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        loss = losses(params, *part)
        if loss.variables is not None:
            raise ConfigError(
                "microbatches: this objective changes variables (running averages) with each part of a batch; set "
                "microbatches to 1."
            )
        return {name: sums[name] + weight for name, (_, weight) in loss.terms.items()}, None

    first = jax.tree.map(lambda x: x[0], (parts, keys))
    names = jax.eval_shape(losses, params, *first).terms
    weights, _ = jax.lax.scan(weighed, dict.fromkeys(names, jnp.float32(0.0)), (parts, keys))

    def one(part: tuple[Batch, jax.Array]) -> Any:
        def scaled(params: Any) -> tuple[jax.Array, Loss]:
            loss = losses(params, *part)
            terms = {name: (value, weights[name]) for name, (value, _) in loss.terms.items()}
            return total(loss._replace(terms=terms), coefficients), loss

        (value, loss), grads = jax.value_and_grad(scaled, has_aux=True)(params)
        return value, loss, grads

    def zero(like: jax.ShapeDtypeStruct) -> jax.Array:
        spec = jax.P() if like.sharding is None else like.sharding.spec
        return jax.sharding.reshard(jnp.zeros(like.shape, like.dtype), spec)

    begin = jax.tree.map(zero, jax.eval_shape(one, first))
    (value, loss, grads), _ = jax.lax.scan(
        lambda sums, part: (jax.tree.map(jnp.add, sums, one(part)), None), begin, (parts, keys)
    )
    return value, loss, grads


def make_evaluation(structure: Structure, objective: Objective) -> Callable[[Any, Any, Batch], Loss]:
    """`evaluate(params, variables, batch) -> Loss`, jitted; its sums, weights and counts add up over batches."""

    def evaluate(params: Any, variables: Any, batch: Batch) -> Loss:
        corrupted = objective.corrupt(jax.random.key(0), batch)
        return objective.loss(structure.merge(params, variables), corrupted, None)

    return jax.jit(evaluate, compiler_options=compiler.options())
