"""Disturbs training jobs on a real Slurm cluster of two nodes, again and again; each must end as an undisturbed one.

    python -m tests.soak.slurm --times 10

By turns the processes get SIGTERM (they save, exit with 75 and are queued again) and a node is lost with all that runs
on it (Slurm queues the job again), each at a random step. The last checkpoint must be that of the undisturbed job, bit
for bit, and so must be the losses of all steps.
"""

import argparse
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mmgpt.core import config
from mmgpt.core.log import read_metrics
from mmgpt.train.run import Run
from tests import tiny
from tests.launch.slurm_cluster import ENDED, NODES, Cluster, cluster
from tests.train.test_loop import same_end

ROOT = Path(__file__).parents[2]
FAULTS = ("term", "loss")


def prepared(folder: Path) -> Run:
    """A run long enough to be disturbed, whose config lies in `folder/base`."""
    (folder / "base").mkdir(parents=True)
    (folder / "data").mkdir()
    run = tiny.run(folder / "data", steps=150, save_every=10, evaluate_every=75)
    (folder / "base" / "config.json").write_text(config.to_json(run))
    return run


def submit(on: Cluster, folder: Path, name: str, *arguments: str) -> str:
    """Launches the prepared run on both nodes; returns Slurm's number of the job."""
    command = [sys.executable, "launch/submit.py", str(folder / "base"), "--backend", "slurm", "--job.nodes", "2"]
    options = ["--run-dir", str(folder / name), "--job.name", name, "--slurm.cpus-per-process", "1", *arguments]
    environment = on.environment | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = re.search(r"Submitted batch job (\d+)", done.stdout)
    assert found is not None, done.stdout
    return found[1]


def at_step(on: Cluster, job: str, run_dir: Path, step: int) -> None:
    """Waits until the job has done a step."""

    def reached() -> bool:
        assert on.job(job)["JobState"] not in ENDED, said(run_dir)
        path = run_dir / "metrics.jsonl"
        return path.exists() and any(line["step"] >= step for line in read_metrics(path))

    on.until(reached, lambda: said(run_dir))


def finished(on: Cluster, job: str, run_dir: Path) -> int:
    """Waits for the end of a job, which must be a good one; returns how often it was put back into the queue."""
    state = on.ended(job, lambda: said(run_dir), 600)
    assert state["JobState"] == "COMPLETED", f"{state}\n{said(run_dir)}"
    return int(state["Restarts"])


def said(run_dir: Path) -> str:
    """The logs of a run's submissions."""
    return "\n".join(path.read_text()[-3000:] for path in run_dir.glob("jobs/*/logs/*"))


def disturb(on: Cluster, job: str, fault: str, node: str) -> None:
    """Does one fault to a running job, and mends the cluster."""
    if fault == "term":
        on.run("scancel", "--signal=TERM", job)
    else:
        on.lose(node)
        on.gain(node)
    on.requeued(job)


def soak(times: int, seed: int, folder: Path, on: Cluster) -> list[str]:
    """Disturbs `times` jobs; returns a line for each. AssertionError where one does not end as it should."""
    chance = random.Random(seed)
    run = prepared(folder)
    lines = []
    assert finished(on, submit(on, folder, "undisturbed"), folder / "undisturbed") == 0
    for turn in range(times):
        fault, node, step = FAULTS[turn % len(FAULTS)], chance.choice(NODES), chance.randrange(2, 130)
        name = f"run-{turn}"
        begun = time.monotonic()
        job = submit(on, folder, name)
        at_step(on, job, folder / name, step)
        disturb(on, job, fault, node)
        restarts = finished(on, job, folder / name)
        assert restarts == 1, f"{name}: {restarts} restarts\n{said(folder / name)}"
        assert same_end(folder / "undisturbed", folder / name, run), f"{name} ended otherwise"
        where = f" of {node}" if fault == "loss" else ""
        lines.append(f"{name}: {fault}{where} at step {step}, resumed exactly, {time.monotonic() - begun:.0f} s")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-", dir="/var/tmp") as folder:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/compiled")
        with cluster() as on:
            lines = soak(args.times, args.seed, Path(folder), on)
    print(f"{len(lines)}/{args.times} resumed exactly")


if __name__ == "__main__":
    main()
