"""The training loop: the order of events, and nothing else."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from mmgpt.core.config import ConfigError
from mmgpt.core.log import Metrics, console, write_json
from mmgpt.core.stream import Batch
from mmgpt.data.loader import Rows
from mmgpt.dist import hosts
from mmgpt.train import state as states
from mmgpt.train.run import Built, Opened, Run, build, build_rows, claim
from mmgpt.train.speed import Meter, matmul_peak
from mmgpt.train.step import make_evaluation, make_step, place

Hook = Callable[[Opened, Metrics], None]
"""Called after each evaluation with the model as it is: draws samples, scores tasks."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How the loop ended: the last step done, and whether it stopped early to be requeued."""

    step: int
    preempted: bool


def train(run: Run, run_dir: Path, hook: Hook | None = None) -> Outcome:
    """Trains a run in its folder, from its newest complete checkpoint if there is one."""
    hosts.start()
    going_on = claim(run, run_dir)
    built = build(run)
    with jax.set_mesh(built.mesh), run.checkpoint.build(run_dir / "checkpoints") as checkpoints:
        rows = build_rows(built, run_dir)
        metrics = Metrics(run_dir)
        try:
            restored = checkpoints.restore(states.abstract(built.structure, built.optimizer, run.ema is not None))
            if restored is not None:
                state, first = restored.state, restored.step
                if restored.position != first * rows.batch_rows:
                    raise ConfigError(
                        f"{run_dir}: row {restored.position} does not belong to step {first}; the batch size changed."
                    )
                console.print(f"going on from step {first} of {run.steps}", highlight=False)
            else:
                state, first = (
                    jax.jit(lambda: states.initial(built.structure, built.optimizer, run.ema is not None))(),
                    0,
                )
            if going_on:
                metrics.truncate(first)
            write_json(run_dir / "data.json", rows.summary())
            return _steps(built, rows, state, first, checkpoints, metrics, hook)
        finally:
            metrics.close()
            rows.close()


def _steps(
    built: Built, rows: Rows, state: states.State, first: int, checkpoints: Any, metrics: Metrics, hook: Hook | None
) -> Outcome:
    run = built.run
    step_fn = make_step(built.structure, built.objective, built.optimizer, seed=run.seed, ema=run.ema)
    evaluation = make_evaluation(built.structure, built.objective)
    held_out = {name: [place(b) for b in rows.held_out_batches(name, run.held_out_batches)] for name in rows.sources}
    shard = (hosts.process_index(), hosts.process_count())
    batches = rows.batches(first * rows.batch_rows, shard)
    peak = matmul_peak()
    meter = Meter()
    done, saved, preempted = first, first, False
    begin = time.perf_counter()
    try:
        while done < run.steps:
            asked = time.perf_counter()
            batch = place(next(batches))
            meter.waited(time.perf_counter() - asked)
            state, values = step_fn(state, batch)
            done += 1
            meter.step()
            if done == first + 1:  # the first step compiled: what follows is timed, this is only told
                jax.block_until_ready(values)
                metrics.write(done, {"compile_seconds": time.perf_counter() - begin}, "start")
                meter.read()
                meter.resume()
            if done % run.log_every == 0 or done == run.steps:
                figures = {k: float(v) for k, v in values.items()}  # waits for the steps that are timed
                metrics.write(done, _speed(built, batch, meter, peak) | figures)
                _tell(done, run.steps, values)
            preempted = hosts.preempted(done)
            last = done == run.steps or preempted
            if done % run.evaluate_every == 0 or done == run.steps:
                jax.block_until_ready(state)
                meter.pause()
                opened = Opened(
                    built, done, state["ema"] if run.ema is not None else state["params"], state["variables"]
                )
                metrics.write(done, evaluate(evaluation, opened, held_out), "held_out")
                if hook is not None and hosts.is_lead():
                    hook(opened, metrics)
                meter.resume()
            if done % run.save_every == 0 or last:
                checkpoints.save(done, state, done * rows.batch_rows, {"steps": run.steps})
                saved = done
            if last:
                break
        assert saved == done or done == first
        checkpoints.wait()
    finally:
        close = getattr(batches, "close", None)
        if close is not None:
            close()
    return Outcome(done, preempted and done < run.steps)


def evaluate(evaluation: Callable[..., Any], opened: Opened, held_out: dict[str, list[Batch]]) -> dict[str, float]:
    """Held-out means by source, `source/metric`: sums and weights are added up over the batches first."""
    values: dict[str, float] = {}
    for source, batches in held_out.items():
        totals: dict[str, tuple[float, float]] = {}
        for batch in batches:
            for name, (total, weight) in evaluation(opened.params, opened.variables, batch).items():
                before = totals.get(name, (0.0, 0.0))
                totals[name] = (before[0] + float(total), before[1] + float(weight))
        values |= {f"{source}/{name}": total / weight for name, (total, weight) in totals.items() if weight > 0}
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
        "matmul_share": flops / (peak * jax.device_count()),
    }


def _tell(done: int, steps: int, values: dict[str, jax.Array]) -> None:
    if hosts.is_lead():
        parts = [f"{name} {float(values[name]):.4g}" for name in ("loss", "gradient_norm", "learning_rate")]
        console.print(f"step {done}/{steps}  {'  '.join(parts)}", highlight=False)
