"""Renders `start.sh`, which is one process of any job, and says when processes that ended are started again."""

import shlex
import signal
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from mmgpt.core.log import console
from mmgpt.dist.hosts import REQUEUE

from .spec import Job

PREEMPTED = (REQUEUE, 128 + signal.SIGTERM, -signal.SIGTERM)
"""Exit codes of a process that was told to stop: it saved, or had not begun to listen; as a shell or as Python says."""
STRANDED = 10.0
"""Seconds that the others have when one failed: they wait for it in vain, and cannot save without it."""
POLL = 0.2
"""Seconds between looks at the processes."""


class Running(Protocol):
    """A process that was started, here or on another machine."""

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""

    def kill(self) -> None:
        """Ends it without a word."""


def start_script(job: Job) -> str:
    """`bash start.sh TASK` trains with the code and the config of the submission, whatever was edited since."""
    spec = job.spec
    lines = [
        "#!/bin/bash",
        f"# One process of the job {spec.name}: bash start.sh TASK",
        "set -e",
        f"job={quote(job.folder)}",
        'task="$1"',
        f"run={quote(spec.run_dir)}" + ('/"$task"' if spec.sweep else ""),
        *spec.setup,
        'export PYTHONPATH="$job/code"',
        "export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1  # the working folder must not hide the job's code",
        'export GIT_CEILING_DIRECTORIES="$job"  # the commit is that of $job/commit.txt, not of a checkout around it',
        *spec.platform.tells,
        *(f"export {name}={quote(value)}" for name, _, value in (pair.partition("=") for pair in spec.environment)),
        f"cd {quote(spec.workdir)}",
        f'exec {quote(spec.python)} -m mmgpt train "$job/tasks/$task" --run-dir "$run"',
    ]
    return "\n".join(lines) + "\n"


def loop_script(command: str, requeue: str, max_restarts: int) -> list[str]:
    """Lines of shell that start `command` until it ends well; `requeue` is what follows on a preemption.

    They exit with 0, or with the code of the last failure.
    """
    preempted = "|".join(str(code) for code in PREEMPTED if code > 0)
    return [
        "failures=0",
        "while true; do",
        "  code=0",
        f"  {command} || code=$?",
        "  case $code in",
        "    0) exit 0 ;;",
        f"    {preempted}) {requeue} ;;",
        "    *)",
        "      failures=$((failures + 1))",
        f'      echo "failure $failures of at most {max_restarts + 1}: exit code $code" >&2',
        f'      if [ "$failures" -gt {max_restarts} ]; then exit "$code"; fi ;;',
        "  esac",
        "done",
    ]


def until_done(once: Callable[[], int], max_restarts: int, stopping: Callable[[], bool] = lambda: False) -> int:
    """Starts `once` until it ends well, and returns its exit code; being preempted is no failure.

    When `stopping` it is not started again.
    """
    failures = 0
    while (code := once()) != 0 and not stopping():
        if code == REQUEUE:
            console.print("preempted and saved; starting again")
            continue
        failures += 1
        console.print(f"failure {failures} of at most {max_restarts + 1}: exit code {code}", style="bold red")
        if failures > max_restarts:
            break
    return code


def ended(processes: Sequence[Running], grace: float) -> int:
    """Waits for all processes of a run and returns one exit code: of the first failure, else 75 or 0.

    When one has ended the others soon do so too; they are killed after `grace` seconds, or sooner where it failed.
    """
    left, codes, end = list(processes), [], float("inf")
    while left:
        for process in list(left):
            if (code := process.poll()) is not None:
                left.remove(process)
                codes.append(code)
                fair = all(code in (0, *PREEMPTED) for code in codes)
                end = min(end, time.monotonic() + (grace if fair else STRANDED))
        if time.monotonic() > end:
            for process in left:
                process.kill()
        time.sleep(POLL)
    failure = next((code for code in codes if code not in (0, *PREEMPTED)), None)
    if failure is None:
        return REQUEUE if any(codes) else 0
    return failure if failure > 0 else 128 - failure


def quote(text: object) -> str:
    """`text` as one word of a shell."""
    return shlex.quote(str(text))
