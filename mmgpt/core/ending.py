"""How a run ends before its time: the exit code by which it is queued again, also before JAX is there."""

import contextlib
import os
import signal
import sys
from typing import Any, NoReturn

REQUEUE = 75
"""Exit code of a run that has saved and wants to go on elsewhere (EX_TEMPFAIL); schedulers map it to a requeue."""


def end(code: int, line: str = "") -> NoReturn:
    """Ends the process at once, from any thread, whatever the others are in; nothing but the output is flushed."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    if line:
        with contextlib.suppress(OSError):
            os.write(2, f"{line}\n".encode())  # not by way of a stream: its lock may be held by a thread that is stuck
    os._exit(code)


def requeue_on_sigterm() -> None:
    """SIGTERM ends the process with REQUEUE from here on: there is nothing to save yet. The main thread calls it."""
    signal.signal(signal.SIGTERM, _requeue)


def _requeue(number: int, frame: Any) -> None:
    end(REQUEUE, "SIGTERM was received before the run began; run the same command to go on")
