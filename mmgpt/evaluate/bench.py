"""Benchmarks: figures as ratios to a peer that is measured in the same run."""

import time
from pathlib import Path

import jax
import numpy as np
import tyro

from mmgpt.core.config import ConfigError
from mmgpt.core.log import check_writable, show, table, write_json
from mmgpt.data.loader import Rows
from mmgpt.train import state as states
from mmgpt.train.run import Built, build, build_rows, load_run
from mmgpt.train.speed import matmul_peak
from mmgpt.train.step import make_step, place


def bench_train(run: tyro.conf.Positional[Path], steps: int = 20, json: Path | None = None) -> None:
    """Times the training step of a run beside a plain float32 matmul, taking turns so that both meet the same load.

    Args:
        run: run folder; its data must be where the run found it, and nothing is written to it.
        steps: steps that are timed.
        json: write the figures.
    """
    if steps < 1:
        raise ConfigError(f"--steps is {steps}; give at least 1.")
    check_writable(json)
    config = load_run(run)
    built = build(config.replace(steps=max(config.steps, steps + 1)))
    with jax.set_mesh(built.mesh):
        rows = build_rows(built, None)
        figures = _measure(built, rows, steps)
        rows.close()
    show(table(str(run), {name: {"value": value} for name, value in figures.items()}))
    if json is not None:
        write_json(json, figures)


def _measure(built: Built, rows: Rows, steps: int) -> dict[str, float]:
    run = built.run
    step = make_step(
        built.structure, built.objective, built.optimizer, seed=run.seed, ema=run.ema, microbatches=run.microbatches
    )
    state = jax.jit(lambda: states.initial(built.structure, built.optimizer, run.ema is not None))()
    batches = rows.batches(0)
    batch = place(next(batches))
    state, values = step(state, batch)
    jax.block_until_ready(values)
    seconds, peaks = [], []
    for _ in range(steps):
        batch = place(next(batches))
        begin = time.perf_counter()
        state, values = step(state, batch)
        jax.block_until_ready(values)
        seconds.append(time.perf_counter() - begin)
        peaks.append(matmul_peak(repeats=1))
    flops = run.model.step_flops(batch) / float(np.median(seconds))
    peak = float(np.median(peaks))
    return {
        "step_seconds": round(float(np.median(seconds)), 4),
        "gflops_per_second": round(flops / 1e9, 1),
        "matmul_gflops_per_second": round(peak / 1e9, 1),
        "matmul_share": round(flops / peak, 3),
    }
