"""A checkpoint of a model's weights and nothing else, at step 0: what another system trained, and a run begins from."""

from typing import Any

import jax

from mmgpt.train import state as states
from mmgpt.train.checkpoint import CheckpointError, Checkpoints
from mmgpt.train.optimizer import Optimizer
from mmgpt.train.state import State, Structure

_META = "weights_alone"


def save_weights(checkpoints: Checkpoints, params: Any, variables: Any) -> None:
    """Saves them as step 0, into `quiet` checkpoints; CheckpointError or OSError when they could not be saved."""
    state = {"params": params, "variables": variables} if jax.tree.leaves(variables) else {"params": params}
    checkpoints.save(0, state, 0, {_META: True})
    if not checkpoints.wait():
        if isinstance(checkpoints.failure, OSError):
            raise checkpoints.failure
        raise CheckpointError(f"the weights could not be saved: {checkpoints.failure}") from checkpoints.failure


def are_alone(checkpoints: Checkpoints, step: int | None = None) -> bool:
    """Whether the newest (or given) step holds weights alone."""
    found = checkpoints.describe(step)
    return found is not None and _META in found.meta


def restore_weights(checkpoints: Checkpoints, structure: Structure, step: int | None = None) -> tuple[Any, Any]:
    """`(params, variables)` of the newest (or given) step; `structure` is of the model without what training adds."""
    whole = states.weights(structure)
    only = [name for name in ("params", "variables") if jax.tree.leaves(whole[name])]
    restored = checkpoints.restore(whole, step, only=only)
    assert restored is not None  # are_alone has seen it
    found = whole | restored.state
    return found["params"], found["variables"]


def begin(structure: Structure, optimizer: Optimizer, ema: bool, params: Any, variables: Any) -> State:
    """A training state at step 0 with these weights; what training adds to the model begins fresh."""

    def start(params: Any, variables: Any) -> State:
        fresh = structure.fresh()
        return states.around(optimizer, ema, *(_over(*pair) for pair in zip(fresh, (params, variables), strict=True)))

    return jax.jit(start, donate_argnums=(0, 1))(params, variables)


def _over(fresh: Any, given: Any) -> Any:
    """The given arrays where there are such, and the fresh ones elsewhere."""
    if not isinstance(fresh, dict):
        return given
    return {name: _over(part, given[name]) if name in given else part for name, part in fresh.items()}
