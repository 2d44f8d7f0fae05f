"""The training loop: the order of events, and nothing else."""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmgpt.core.config import ConfigError
from mmgpt.core.log import Metrics, Untold, console, write_json
from mmgpt.core.stream import Batch
from mmgpt.data.loader import Rows
from mmgpt.dist import axes as rules
from mmgpt.dist import hosts
from mmgpt.objectives.objective import Loss
from mmgpt.train import state as states
from mmgpt.train.checkpoint import CheckpointError, Checkpoints
from mmgpt.train.run import Built, Opened, Run, alone, build, build_rows, claim, without_training_parts
from mmgpt.train.speed import Meter, matmul_peak
from mmgpt.train.step import make_evaluation, make_step, place
from mmgpt.train.weights import are_alone, begin, restore_weights

Hook = Callable[[Opened, Metrics], None]
"""Called with the model as it is: draws samples, scores tasks, writes it in another format."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How the loop ended: the last step done, and whether it stopped early to be requeued."""

    step: int
    preempted: bool


def train(run: Run, run_dir: Path, hook: Hook | None = None, export: Hook | None = None) -> Outcome:
    """Trains a run in its folder, from its newest complete checkpoint if there is one.

    `hook` is called after each evaluation, `export` every `export_every` steps.
    """
    hosts.start()
    run.mesh.split_cpu()  # before anything asks for a device
    with contextlib.ExitStack() as held:
        if hosts.is_lead():
            held.enter_context(alone(run_dir))
        going_on = claim(run, run_dir)
        built = build(run)
        held.enter_context(jax.set_mesh(built.mesh))
        checkpoints = held.enter_context(run.checkpoint.build(run_dir / "checkpoints"))
        rows = build_rows(built, run_dir)
        metrics = Metrics(run_dir) if hosts.is_lead() else Untold(run_dir)
        try:
            state, first = _start(built, checkpoints, rows, run_dir)
            if going_on:
                metrics.truncate(first)
            if hosts.is_lead():
                write_json(run_dir / "data.json", rows.summary())
            return _steps(built, rows, state, first, checkpoints, metrics, hook, export)
        finally:
            metrics.close()
            rows.close()


def _start(built: Built, checkpoints: Checkpoints, rows: Rows, run_dir: Path) -> tuple[states.State, int]:
    """The state to go on from and the steps done: the newest complete checkpoint's, or a fresh one."""
    ema = built.run.ema is not None
    if are_alone(checkpoints):
        console.print(f"{run_dir}: beginning with the weights that are there")
        weights = restore_weights(checkpoints, without_training_parts(built).structure)
        return begin(built.structure, built.optimizer, ema, *weights), 0
    restored = checkpoints.restore(states.abstract(built.structure, built.optimizer, ema))
    if restored is None:
        return jax.jit(lambda: states.initial(built.structure, built.optimizer, ema))(), 0
    if restored.position != restored.step * rows.batch_rows:
        raise ConfigError(
            f"{run_dir}: the checkpoint of step {restored.step} was saved at row {restored.position}, but this data "
            f"has {rows.batch_rows} rows a step. Give the batch size that the run had."
        )
    done = restored.step == built.run.steps
    what = f"{run_dir}: all {restored.step} steps are done" if done else f"going on from step {restored.step}"
    console.print(what if done else f"{what} of {built.run.steps}")
    return restored.state, restored.step


def _steps(
    built: Built,
    rows: Rows,
    state: states.State,
    first: int,
    checkpoints: Checkpoints,
    metrics: Metrics,
    hook: Hook | None,
    export: Hook | None,
) -> Outcome:
    run = built.run
    step_fn = make_step(
        built.structure, built.objective, built.optimizer, seed=run.seed, ema=run.ema, microbatches=run.microbatches
    )
    evaluation = make_evaluation(built.structure, built.objective)
    share = rules.share("batch", built.mesh)
    held_out = {
        name: [place(_part(b, share), share[1]) for b in rows.held_out_batches(name, run.held_out_batches)]
        for name in rows.sources
    }
    batches = rows.batches(first * rows.batch_rows, share)
    peak = matmul_peak()
    meter = Meter()
    done, preempted = first, False
    begin = time.perf_counter()
    while done < run.steps and not preempted:
        asked = time.perf_counter()
        batch = place(next(batches), share[1])
        meter.waited(time.perf_counter() - asked)
        state, values = step_fn(state, batch)
        done += 1
        meter.step()
        if done == first + 1:  # the first step compiles: it is told, and timing begins after it
            jax.block_until_ready(values)
            metrics.write(done, {"compile_seconds": time.perf_counter() - begin}, "start")
            meter.read()
            meter.resume()
        if done % run.log_every == 0 or done == run.steps:
            figures = {k: float(v) for k, v in values.items()}  # waits for the steps that are timed
            speed = _speed(built, batch, meter, peak)
            metrics.write(done, speed | figures)
            _tell(done, run.steps, figures, speed)
        preempted = hosts.preempted(done)
        if preempted:  # before anything else: there may be seconds left
            checkpoints.save(done, state, done * rows.batch_rows, {"steps": run.steps})
        if done % run.evaluate_every == 0 or done == run.steps:
            jax.block_until_ready(state)
            meter.pause()
            opened = _opened(built, done, state)
            metrics.write(done, evaluate(evaluation, opened, held_out), "held_out")
            if hook is not None and hosts.process_count() == 1:  # it computes on its own, which one of many cannot
                hook(opened, metrics)
            if done < run.steps:
                peak = matmul_peak()  # measured again: a shared machine's speed drifts
            meter.resume()
        if export is not None and run.export_every and done % run.export_every == 0 and not preempted:
            export(_opened(built, done, state), metrics)
        if not preempted:
            checkpoints.save_local(done, state, done * rows.batch_rows, {"steps": run.steps})
        if (done % run.save_every == 0 or done == run.steps) and not preempted:
            checkpoints.save(done, state, done * rows.batch_rows, {"steps": run.steps})
    if not checkpoints.wait():
        raise CheckpointError(
            f"{checkpoints.directory}: step {done} is done, but could not be saved; free some space and run the same "
            "command again, which goes on from the newest checkpoint there."
        )
    return Outcome(done, preempted and done < run.steps)


def _opened(built: Built, done: int, state: states.State) -> Opened:
    return Opened(built, done, state["params"] if built.run.ema is None else state["ema"], state["variables"])


def _part(batch: Batch, share: tuple[int, int]) -> Batch:
    """This process's part of a global batch's rows."""
    part, parts = share
    return jax.tree.map(lambda leaf: np.split(leaf, parts)[part], batch)


def evaluate(evaluation: Callable[..., Any], opened: Opened, held_out: dict[str, list[Batch]]) -> dict[str, float]:
    """Held-out means by source, `source/metric`: sums, weights and counts are added up over the batches first."""
    values: dict[str, float] = {}
    for source, batches in held_out.items():
        losses = [evaluation(opened.params, opened.variables, batch) for batch in batches]
        whole: Loss = jax.tree.map(lambda *parts: sum(np.asarray(part, np.float64) for part in parts), *losses)
        pairs = {name: (float(total), float(weight)) for name, (total, weight) in whole.figures().items()}
        values |= {f"{source}/{name}": total / weight for name, (total, weight) in pairs.items() if weight > 0}
    return values


def _speed(built: Built, batch: Batch, meter: Meter, peak: float) -> dict[str, float]:
    steps, seconds, wait = meter.read()
    if steps == 0 or seconds == 0.0:
        return {}
    flops = steps * built.run.model.step_flops(batch) / seconds
    return {
        "step_seconds": seconds / steps,
        "data_wait_share": wait / seconds,
        "flops_per_second": flops,
        "matmul_share": flops / peak,
    }


def _tell(done: int, steps: int, figures: dict[str, float], speed: dict[str, float]) -> None:
    if hosts.is_lead():
        parts = [f"{name} {figures[name]:.4g}" for name in ("loss", "gradient_norm", "learning_rate")]
        if "step_seconds" in speed:
            left = round((steps - done) * speed["step_seconds"])
            parts.append(f"{speed['step_seconds']:.3g} s/step  {left // 60}:{left % 60:02d} left")
        console.print(f"step {done}/{steps}  {'  '.join(parts)}")
