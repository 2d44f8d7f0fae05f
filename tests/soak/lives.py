"""A real run (`mmgpt train`) in one or two processes that are disturbed from outside, and what it leaves."""

import contextlib
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mmgpt.core import config
from mmgpt.core.log import read_metrics
from mmgpt.train.run import Run
from tests import tiny
from tests.train.test_loop import lines, prepared, same_end

ROOT = Path(__file__).parents[2]
HEARTBEAT, JOIN = 5, 60
PATIENCE = 600
"""Seconds after which a soak gives up waiting for something."""


def run_of(folder: Path, steps: int, **changes: object) -> Run:
    """A small run whose data lie in a folder, and whose processes notice each other's loss soon."""
    folder.mkdir(parents=True)
    run = tiny.run(folder, steps=steps, evaluate_every=20, save_every=3)
    return run.replace(hosts=run.hosts.replace(heartbeat=HEARTBEAT, join=JOIN), **changes)


@dataclasses.dataclass
class Life:
    """The processes of a run between two starts."""

    folder: Path
    processes: list[subprocess.Popen[bytes]]
    log: Path

    def said(self) -> str:
        """What they wrote, of this life alone."""
        return self.log.read_text(errors="replace")

    def lives(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def until(self, reached: Callable[[], bool]) -> bool:
        """Waits; False if a process ended before."""
        end = time.monotonic() + PATIENCE
        while self.lives():
            if reached():
                return True
            assert time.monotonic() < end, self.said()[-3000:]
            time.sleep(0.005)
        return False

    def told(self, kind: str = "train") -> int:
        """The last step of which the metrics tell."""
        path = self.folder / "metrics.jsonl"
        found = [line["step"] for line in read_metrics(path) if line["kind"] == kind] if path.exists() else []
        return max(found, default=0)

    def ended(self, seconds: float = PATIENCE) -> list[int]:
        """Waits for all processes; their exit codes."""
        return [process.wait(seconds) for process in self.processes]

    def send(self, number: int, *to: int) -> None:
        """A signal to those processes, or to all."""
        for index in to or range(len(self.processes)):
            self.processes[index].send_signal(number)

    def children(self) -> list[int]:
        """Processes that the processes have started: the loader's workers."""
        found = []
        for process in self.processes:
            for task in Path(f"/proc/{process.pid}/task").glob("*/children"):
                found += [int(pid) for pid in task.read_text().split()]
        return [pid for pid in found if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()]


@contextlib.contextmanager
def life(folder: Path, processes: int, *, cached: bool = True, **environment: str) -> Iterator[Life]:
    """Starts a run; whatever is left of it at the end is killed. Two devices in all, in one process or in two."""
    told = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"} | environment
    told["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={2 // processes}"
    told["JAX_COMPILATION_CACHE_DIR"] = str(folder.parent / "compiled") if cached else ""
    told["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            told["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{probe.getsockname()[1]}"
        told["JAX_NUM_PROCESSES"] = str(processes)
    log = folder.parent / f"{folder.name}.log"
    command = [sys.executable, "-m", "mmgpt", "train", str(folder)]
    with open(log, "wb") as out:
        started = [
            subprocess.Popen(command, cwd=ROOT, env=told | {"JAX_PROCESS_ID": str(i)}, stdout=out, stderr=out)
            for i in range(processes)
        ]
    found = Life(folder, started, log)
    workers: list[int] = []
    try:
        yield found
    finally:
        with contextlib.suppress(OSError):
            workers = found.children()
        for pid in [*workers, *(process.pid for process in started)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        found.ended()


def finish(folder: Path, processes: int) -> None:
    """Starts a run once more, and lets it end."""
    with life(folder, processes) as last:
        codes = last.ended()
        assert set(codes) == {0}, f"{codes}\n{last.said()[-5000:]}"


def begun(run: Run, folder: Path) -> Path:
    """A run folder in which nothing was done yet."""
    return prepared(run, folder)


def saved(folder: Path) -> int:
    """The newest step that is whole."""
    found = [int(p.name) for p in (folder / "checkpoints").glob("*") if p.name.isdecimal()]
    return max(found, default=0)


def is_saving(folder: Path) -> bool:
    """Whether a step is being written, or was when the run was killed."""
    return any((folder / "checkpoints").glob("*.saving*"))


def as_undisturbed(undisturbed: Path, folder: Path, run: Run) -> None:
    """AssertionError where a run did not end as the undisturbed one: arrays, losses of all steps, held-out figures."""
    assert same_end(undisturbed, folder, run), f"{folder.name} ended otherwise"
    one, other = lines(undisturbed, "held_out"), lines(folder, "held_out")
    figures = [{step: {k: v for k, v in line.items() if k != "time"} for step, line in x.items()} for x in (one, other)]
    assert figures[0] == figures[1], f"{folder.name} was evaluated otherwise"
    left = [p.name for p in (folder / "checkpoints").iterdir() if re.search(r"\.(saving|deleting|corrupt)", p.name)]
    assert left == [], f"{folder.name} left {left}"


def config_of(folder: Path) -> Run:
    """The config of a run folder."""
    run = config.load(folder / "config.json")
    assert isinstance(run, Run)
    return run
