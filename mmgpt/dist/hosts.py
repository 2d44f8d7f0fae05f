"""Processes of a run: start and end, barriers, and the notice that the scheduler wants the machines back.

One process catches SIGTERM itself. Several join through `jax.distributed`, whose coordination service carries the
notice of any of them to all and picks a step that none of them has passed.
"""

import os
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

from mmgpt.core.log import console

REQUEUE = 75
"""Exit code of a run that has saved and wants to go on elsewhere (EX_TEMPFAIL); schedulers map it to a requeue."""


class _Signal:
    """What this process knows about SIGTERM."""

    def __init__(self) -> None:
        self.owner: int | None = None
        self.previous: Any = None
        self.caught = False
        self.agreed = False
        self.polls = 0


_signal = _Signal()


def start(
    coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the other processes of the run, if there are any, and listens for SIGTERM from here on.

    With no argument the cluster says (Slurm, Cloud TPU, Kubernetes, or `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`
    and `JAX_PROCESS_ID`); where there is no cluster, or for `num_processes=1`, this is a run of one process. A second
    call does nothing. Call it before JAX touches a device; a run of one process may call it later.
    """
    if _signal.owner == os.getpid():
        return
    _listen()
    coordinator_address = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if num_processes is None and coordinator_address and "JAX_NUM_PROCESSES" in os.environ:
        num_processes = int(os.environ["JAX_NUM_PROCESSES"])
    if process_id is None and coordinator_address and "JAX_PROCESS_ID" in os.environ:
        process_id = int(os.environ["JAX_PROCESS_ID"])
    if num_processes == 1 or jax.distributed.is_initialized():
        return
    if None not in (coordinator_address, num_processes, process_id):
        # All is said: the cluster's environment must not restrict the devices of this process as well.
        detection = "deactivate"
    elif coordinator_address is None and num_processes is None and process_id is None and devices_in_use():
        return
    else:
        detection = None
    try:
        jax.distributed.initialize(coordinator_address, num_processes, process_id, cluster_detection_method=detection)
    except ValueError as e:
        if (coordinator_address, num_processes, process_id) != (None, None, None):
            raise ValueError(
                f"cannot join the run: coordinator_address={coordinator_address}, num_processes={num_processes}, "
                f"process_id={process_id} and no cluster that says the rest ({e}). Give all three."
            ) from e
        # JAX knows no cluster here: one process, which needs no coordinator.


def shutdown() -> None:
    """Leaves the run; every process must call it, and waits for the others. SIGTERM is as it was before `start`."""
    global _signal
    if _signal.owner is None:
        return
    jax.distributed.shutdown()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _signal.previous if _signal.previous is not None else signal.SIG_DFL)
    _signal = _Signal()


def process_index() -> int:
    """Number of this process, 0 for the lead."""
    return jax.process_index()


def process_count() -> int:
    """Number of processes of the run."""
    return jax.process_count()


def is_lead() -> bool:
    """Whether this process writes what the run has only once: manifests, metrics, messages."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process is here. `name` must be the same on all; a different one raises AssertionError."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def preempted(step: int) -> bool:
    """Whether the run should save and exit with REQUEUE now: true on every process at the same call, and from then on.

    Every process calls it once after each step. With several processes it turns true a step or two, and up to about a
    second, after the first of them got SIGTERM.
    """
    if not _signal.agreed:
        if jax.distributed.is_initialized():
            # The service agrees on one number and says so only at that number. Counting calls leaves no gaps, as
            # steps could, and starts every process of a resumed run at the same number.
            _signal.polls += 1
            _signal.agreed = multihost_utils.reached_preemption_sync_point(_signal.polls)
        else:
            _signal.agreed = _signal.caught
        if _signal.agreed and is_lead():
            console.print(f"preempted: SIGTERM was received; the run stops after step {step}", style="bold yellow")
    return _signal.agreed


def _listen() -> None:
    _signal.owner = os.getpid()
    if threading.current_thread() is not threading.main_thread():
        return  # Python delivers signals to the main thread only
    _signal.previous = signal.signal(signal.SIGTERM, _on_sigterm)


def _on_sigterm(number: int, frame: Any) -> None:
    if os.getpid() != _signal.owner:
        # A forked worker inherits the handler and must still die of SIGTERM.
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    _signal.caught = True


def devices_in_use() -> bool:
    """Whether JAX has touched a device, after which neither processes nor devices can be added."""
    from jax._src import xla_bridge  # the check that jax.distributed.initialize makes, which has no public name

    return xla_bridge.backends_are_initialized()
