"""Where a run goes on from: its newest checkpoint, weights that were put there, or nothing."""

from pathlib import Path
from typing import Any

import jax

from mmgpt.core.config import ConfigError
from mmgpt.core.log import console
from mmgpt.train import state as states
from mmgpt.train.checkpoint import Checkpoints
from mmgpt.train.rollback import abandon
from mmgpt.train.run import Built, without_training_parts
from mmgpt.train.skips import Skips
from mmgpt.train.weights import are_alone, begin, restore_weights


def start(
    built: Built, run_dir: Path, checkpoints: Checkpoints, skips: Skips
) -> tuple[states.State, int, dict[str, Any]]:
    """The state, the steps done, and what the loop saved with them: of the newest complete checkpoint, or fresh.

    ConfigError where the checkpoint is not at the row that so many steps come to.
    """
    abandon(checkpoints, skips)
    ema = built.run.ema is not None
    if are_alone(checkpoints):
        console.print(f"{run_dir}: beginning with the weights that are there")
        weights = restore_weights(checkpoints, without_training_parts(built).structure)
        return begin(built.structure, built.optimizer, ema, *weights), 0, {}
    restored = checkpoints.restore(states.abstract(built.structure, built.optimizer, ema))
    if restored is None:
        return jax.jit(lambda: states.initial(built.structure, built.optimizer, ema))(), 0, {}
    if skips.step(restored.position) != restored.step:
        raise ConfigError(
            f"{run_dir}: the checkpoint of step {restored.step} was saved at row {restored.position}, but this data "
            f"has {skips.batch_rows} rows a step. Give the batch size that the run had."
        )
    done = restored.step >= built.run.steps
    what = f"{run_dir}: all {restored.step} steps are done" if done else f"going on from step {restored.step}"
    console.print(what if done else f"{what} of {built.run.steps}")
    return restored.state, restored.step, restored.meta
