"""What a process trains with from its start to its end, and what may follow a step: evaluation, export, a save."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from mmgpt.core.log import Metrics
from mmgpt.data.loader import Rows
from mmgpt.dist import hosts
from mmgpt.train.checkpoint import Checkpoints
from mmgpt.train.goodput import Clock
from mmgpt.train.held_out import HeldOut
from mmgpt.train.replay import Step
from mmgpt.train.run import Built, Opened
from mmgpt.train.skips import Skips
from mmgpt.train.spikes import Spikes
from mmgpt.train.state import State

Hook = Callable[[Opened, Metrics], None]
"""Called with the model as it is: draws samples, scores tasks, writes it in another format."""


@dataclasses.dataclass
class Life:
    """What a process trains with; a rollback changes `skips` and `spikes`, and makes `rows` more."""

    built: Built
    run_dir: Path
    rows: Rows
    checkpoints: Checkpoints
    metrics: Metrics
    clock: Clock
    step: Step
    skips: Skips
    spikes: Spikes
    hook: Hook | None
    export: Hook | None
    owed: bool = False
    """Whether what follows the last step is still to be done: a run that is stopped before does it when it goes on."""

    def follow(self, held_out: HeldOut, done: int, state: State) -> bool:
        """Evaluates and exports after a step where that is due; whether it evaluated. Left early it stays `owed`."""
        run = self.built.run
        evaluates = done % run.evaluate_every == 0 or done == run.steps
        if evaluates:
            jax.block_until_ready(state)
            self.clock.to("evaluate")
            opened = self._opened(done, state)
            if (figures := held_out(opened)) is None:
                return False
            self.metrics.write(done, figures, "held_out")
            if self.hook is not None and hosts.process_count() == 1:  # it computes on its own, as one of many cannot
                self.hook(opened, self.metrics)
            self.clock.to("steps")
        if self.export is not None and run.export_every and done % run.export_every == 0:
            self.export(self._opened(done, state), self.metrics)
        self.owed = False
        return evaluates

    def save(self, done: int, state: State, to: Callable[..., Any]) -> Any:
        """Saves a step by a method of `checkpoints`, with all that the run needs to go on as if it had not ended."""
        memory = self.spikes.memory()  # waits for the steps
        self.clock.to("save")
        meta = {"steps": self.built.run.steps, "spikes": memory, "seconds": self.clock.seconds(), "owed": self.owed}
        done_well = to(done, state, self.skips.row(done), meta)
        self.clock.to("steps")
        return done_well

    def _opened(self, done: int, state: State) -> Opened:
        weights = state["params"] if self.built.run.ema is None else state["ema"]
        return Opened(self.built, done, weights, state["variables"])
