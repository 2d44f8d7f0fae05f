"""The training loop: the order of events, and nothing else."""

import contextlib
import dataclasses
import functools
from pathlib import Path

import jax

from mmgpt.core.log import Metrics, Untold, write_json
from mmgpt.dist import axes as rules
from mmgpt.dist import hosts
from mmgpt.train import goodput, replay
from mmgpt.train.checkpoint import CheckpointError
from mmgpt.train.feed import feed
from mmgpt.train.goodput import Clock, Rates
from mmgpt.train.held_out import HeldOut
from mmgpt.train.life import Hook, Life
from mmgpt.train.rollback import go_back
from mmgpt.train.run import Run, alone, build, build_rows, changes, goes_on, record
from mmgpt.train.skips import Skips
from mmgpt.train.speed import matmul_peak, speed, tell
from mmgpt.train.spikes import Spike
from mmgpt.train.start import start
from mmgpt.train.state import State
from mmgpt.train.step import make_step, place


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How the loop ended: the last step done, and whether it stopped early to be requeued."""

    step: int
    preempted: bool


def train(run: Run, run_dir: Path, hook: Hook | None = None, export: Hook | None = None) -> Outcome:
    """Trains a run in its folder, from its newest complete checkpoint if there is one.

    `hook` is called after each evaluation, `export` every `export_every` steps. Raises UserError: SpikeError after too
    many rollbacks, and Corruption, after which the run is to go on from its checkpoint on other machines. A SIGTERM
    ends the process after a save, unless it comes in a step, after which the run stops; a lost process ends the others.
    """
    clock = Clock()
    with contextlib.ExitStack() as held:
        held.enter_context(hosts.stoppable())
        hosts.start(settings=run.hosts)
        run.mesh.split_cpu()  # before anything asks for a device
        if hosts.is_lead():
            held.enter_context(alone(run_dir))
        built = build(run)
        going_on = goes_on(run, run_dir)
        hosts.barrier("run folder checked")
        held.enter_context(jax.set_mesh(built.mesh))
        checkpoints = held.enter_context(run.checkpoint.build(run_dir / "checkpoints"))
        metrics = held.enter_context(contextlib.closing(Metrics(run_dir) if hosts.is_lead() else Untold(run_dir)))
        step = make_step(
            built.structure, built.objective, built.optimizer, seed=run.seed, ema=run.ema, microbatches=run.microbatches
        )
        skips = Skips.load(run_dir, run.data.batch_rows)
        with hosts.stoppable(), hosts.watched():
            rows = held.enter_context(contextlib.closing(build_rows(built, run_dir, skips)))
        life = Life(built, run_dir, rows, checkpoints, metrics, clock, step, skips, run.spikes.build(), hook, export)
        again = False
        while True:
            with hosts.stoppable(), hosts.watched():
                try:
                    return _from_the_newest(life, going_on, again)
                except (Spike, replay.Corruption) as e:
                    met = e.with_traceback(None)  # whose frames hold the state, of which there may be room for one
            # Out here: what passes `watched` is taken for a failure of this process alone, and this is met by all.
            if not isinstance(met, Spike):
                raise met
            life.skips = go_back(met, life.skips, run, checkpoints, run_dir)
            rows.grow(life.skips.rows(run.steps))
            going_on = again = True


def _from_the_newest(life: Life, going_on: bool, again: bool) -> Outcome:
    """Trains from the newest checkpoint that the skips allow; `again` after a rollback. Raises Spike."""
    run, skips = life.built.run, life.skips
    life.spikes = run.spikes.build([skips.step(change.step * skips.batch_rows) + 1 for change in changes(run)])
    state, first, meta = start(life.built, life.run_dir, life.checkpoints, skips)
    if not again:
        record(run, life.run_dir, going_on)
    life.spikes.recall(meta.get("spikes"))
    if again:
        life.clock.go_back(meta.get("seconds", {}))
    elif hosts.is_lead():
        life.clock.begin(meta.get("seconds", {}), goodput.spent(life.metrics.path, meta.get("steps") == first))
    if going_on:
        life.metrics.truncate(first, again=("held_out",) if meta.get("owed") else ())
    if again:
        life.metrics.write(first, skips.told(), "rollback")
    if hosts.is_lead():
        write_json(life.run_dir / "data.json", life.rows.summary())
    return _steps(life, state, first, meta.get("owed", False))


def _steps(life: Life, state: State, first: int, owed: bool) -> Outcome:
    built, clock, metrics, spikes, checkpoints = life.built, life.clock, life.metrics, life.spikes, life.checkpoints
    run = built.run
    share = rules.share("batch", built.mesh)
    held_out = HeldOut(built, life.rows, share)
    batches = feed(life.rows, life.skips, first, share)
    every = run.replay_every if run.replay_every is not None and replay.possible() else run.steps + 1
    life.owed = owed
    if owed:
        life.follow(held_out, first, state)
        if life.owed:
            return Outcome(first, preempted=True)
        if first == run.steps:  # or each further start would do so again
            life.save(first, state, checkpoints.save)
    peak = matmul_peak()
    clock.to("compile")
    rates, compiled, done, preempted = Rates(clock), clock.seconds()["compile"], first, False
    while done < run.steps:
        if done > first:
            clock.to("data")
        hosts.rest()
        batch = place(next(batches), share[1])
        hosts.begin_step()
        if (done + 1) % every == 0:
            jax.block_until_ready(state)
            clock.to("replay")
            state, values = replay.twice(life.step, state, batch, done + 1, life.run_dir)
        else:
            clock.to("steps" if done > first else "compile")
            state, values = life.step(state, batch)
        done += 1
        spikes.add(done, values)
        if done == first + 1:  # the first step compiles: it is told, and timing begins after it
            jax.block_until_ready(values)
            clock.to("steps")
            metrics.write(done, {"compile_seconds": clock.seconds()["compile"] - compiled}, "start")
            rates.read(done)
        if done % run.log_every == 0 or done == run.steps:
            skipped = spikes.read()  # waits for the steps that are timed
            figures = speed(built, batch, rates.read(done), peak) | {k: float(v) for k, v in values.items()}
            metrics.write(done, figures | {"skipped": skipped})
            metrics.write(done, clock.figures(), goodput.LINE)
            if hosts.is_lead():
                tell(done, run.steps, figures)
        life.owed = True
        preempted = hosts.preempted(done, functools.partial(life.save, done, state, checkpoints.save_last))
        if not preempted and life.follow(held_out, done, state):
            peak = matmul_peak()  # measured again: a shared machine's speed drifts
        preempted = preempted or life.owed
        if preempted:  # before anything else: there may be seconds left
            life.save(done, state, checkpoints.save)
            break
        if checkpoints.is_local(done):
            life.save(done, state, checkpoints.save_local)
        if done % run.save_every == 0 or done == run.steps:
            life.save(done, state, checkpoints.save)
    clock.to("save")
    if not checkpoints.wait():
        raise CheckpointError(
            f"{checkpoints.directory}: step {done} is done, but could not be saved; free some space and run the same "
            "command again, which goes on from the newest checkpoint there."
        )
    if done > first:
        metrics.write(done, clock.figures(), goodput.LINE)
    if hosts.is_lead():
        clock.tell()
    return Outcome(done, preempted)
