"""Going back before a spike: which rows are left out from then on, and which checkpoints are of the future given up."""

import time
from pathlib import Path

from mmgpt.core.errors import UserError
from mmgpt.core.log import console
from mmgpt.train.checkpoint import Checkpoints
from mmgpt.train.run import Run
from mmgpt.train.skips import NAME, Skip, Skips
from mmgpt.train.spikes import Spike


class SpikeError(UserError, RuntimeError):
    """A spike that a rollback cannot or may not undo; the message says what to do."""


def go_back(spike: Spike, skips: Skips, run: Run, checkpoints: Checkpoints, run_dir: Path) -> Skips:
    """Records the rows to leave out; every process calls it. From the record on the rollback has happened.

    Raises SpikeError where there were too many before, or no checkpoint from before the spike is left.
    """
    if len(skips.found) >= run.spikes.rollbacks:
        raise SpikeError(
            f"{run_dir}: {spike}. The run went back {len(skips.found)} times already, as {NAME} there tells, and "
            f"spikes.rollbacks is {run.spikes.rollbacks}. Lower the learning rate or look at the data of those rows; "
            "more rollbacks let it go on."
        )
    half = run.spikes.skip // 2
    begin = _begin(spike, max(0, spike.first - 1 - half), run, checkpoints, run_dir)
    stop = max(spike.last, spike.first - 1 + half)
    skip = Skip(
        first_row=skips.row(begin),
        stop_row=skips.row(stop - 1) + skips.batch_rows,
        why=spike.why,
        first_step=spike.first,
        last_step=spike.last,
        time=round(time.time(), 3),
    )
    console.print(
        f"spike: {spike}. Going back to step {begin} or before; rows {skip.first_row} to {skip.stop_row} are left out.",
        style="bold yellow",
    )
    more = Skips(skips.batch_rows, (*skips.found, skip))
    more.save(run_dir)
    return more


def abandon(checkpoints: Checkpoints, skips: Skips) -> None:
    """Sets aside the checkpoints that were trained on rows which are left out now."""
    if skips.found:
        checkpoints.set_aside("abandoned", lambda found: skips.step(found.position) != found.step)


def _begin(spike: Spike, wanted: int, run: Run, checkpoints: Checkpoints, run_dir: Path) -> int:
    """The step from which on rows are left out: the one wanted, or that of the oldest checkpoint where it is later."""
    known = checkpoints.known()
    before = [step for step in known if step < spike.first]
    if before:
        return max(wanted, before[0])
    if known and spike.first > run.save_every:
        raise SpikeError(
            f"{run_dir}: {spike}, and every checkpoint is from after that: {known}. Raise checkpoint.keep or "
            "save_every, so that older ones are there; to go on, lower the learning rate and choose another run folder."
        )
    return wanted  # from the beginning: nothing was to be saved before
