"""Starts the processes on this machine, with a log file each, one task after the other.

SIGTERM and Ctrl-C reach all processes, which save; the command then exits with 75. When one process ends the others
are ended too, and all start again where it was preempted (75) or, a bounded number of times, where it failed.
"""

import functools
import os
import signal
import socket
import subprocess
from pathlib import Path
from types import FrameType

from mmgpt.core.ending import REQUEUE
from mmgpt.core.log import console

from .process import ended, until_done
from .spec import Job, JobSpec, LaunchError, Platform


class Local(Platform):
    """This machine, which has no options."""

    program = "setpriv"
    comes_with = "util-linux"

    def check(self, spec: JobSpec, tasks: int) -> None:
        if spec.nodes != 1:
            raise LaunchError("--backend local is this machine: leave job.nodes at 1, give job.processes_per_node.")
        if spec.minutes or spec.accelerator or spec.chips_per_node:
            raise LaunchError(
                "--backend local takes the devices that are there and has no time limit: leave out job.accelerator, "
                "job.chips_per_node and job.minutes."
            )

    def render(self, job: Job) -> dict[str, str]:
        return {}

    def commands(self, job: Job) -> list[list[str]]:
        """Task by task, each its processes; where they meet is told when they start."""
        count = job.spec.processes_per_node
        return [
            [
                *["env", f"JAX_NUM_PROCESSES={count}", f"JAX_PROCESS_ID={number}"],
                # Were the launcher killed, the processes would go on with nobody to start them again.
                *["setpriv", "--pdeathsig", "TERM", "bash", str(job.folder / "start.sh"), str(task)],
            ]
            for task in range(len(job.run_dirs))
            for number in range(count)
        ]

    def submit(self, job: Job) -> int:
        """Runs all tasks and returns the exit code of the first that failed, 75 where it was told to stop."""
        processes = _Processes(job.spec.grace)
        before = {number: signal.signal(number, processes.stop) for number in (signal.SIGTERM, signal.SIGINT)}
        codes = []
        try:
            for task, run_dir in enumerate(job.run_dirs):
                logs = job.folder / "logs" / job.name(task)
                console.print(f"{job.name(task)} trains in {run_dir}; logs: {logs}-*.log")
                count = job.spec.processes_per_node
                commands = self.commands(job)[task * count : (task + 1) * count]
                once = functools.partial(processes.run, commands, logs)
                codes.append(until_done(once, job.spec.max_restarts, lambda: processes.stopping))
                if processes.stopping:
                    return codes[-1]
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return next((code for code in codes if code), 0)


class _Processes:
    """The processes of one task, which begin and end together."""

    def __init__(self, grace: float) -> None:
        self.stopping = False
        self._grace = grace
        self._running: list[subprocess.Popen[bytes]] = []

    def run(self, commands: list[list[str]], logs: Path) -> int:
        """Starts them, waits until all have ended, and returns one exit code for all."""
        told = os.environ | {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{_free_port()}"}
        self._running = []
        try:
            for number, command in enumerate(commands):
                with open(f"{logs}-{number}.log", "ab") as log:
                    # In a session of its own, so that Ctrl-C reaches the launcher alone.
                    process = subprocess.Popen(
                        command, env=told, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                    )
                self._running.append(process)
                if self.stopping:  # told while they were being started
                    process.terminate()
            code = ended(self._running, self._grace)
            if code not in (0, REQUEUE) and not self.stopping:
                for number in range(len(commands)):
                    console.print(f"{logs.name}-{number}.log ends: {_last_line(f'{logs}-{number}.log')}", markup=False)
            return code
        finally:
            self._signal(signal.SIGKILL)

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal: the processes may save; a second one ends them."""
        if not self.stopping:
            console.print("stopping: the processes save first; once more ends them at once", style="bold yellow")
        self._signal(signal.SIGKILL if self.stopping else signal.SIGTERM)
        self.stopping = True

    def _signal(self, number: int) -> None:
        for process in self._running:
            process.send_signal(number)


def _last_line(path: str) -> str:
    """What a log ends with, of which only the end is read: it may be long."""
    with open(path, "rb") as log:
        log.seek(max(0, os.path.getsize(path) - 2000))
        return log.read().decode(errors="replace").strip().rpartition("\n")[2]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
