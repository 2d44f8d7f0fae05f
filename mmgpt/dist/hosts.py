"""Processes of a run: start and end, barriers, and the notice that the scheduler wants the machines back.

`peers.py` watches the other processes, `stopping.py` listens for SIGTERM.
"""

import os

import jax
from jax.experimental import multihost_utils

from mmgpt.core.ending import REQUEUE
from mmgpt.core.log import console
from mmgpt.dist import peers, stopping
from mmgpt.dist.peers import Hosts, JoinError, watched
from mmgpt.dist.stopping import Save, begin_step, rest, stoppable

__all__ = [
    "REQUEUE",
    "Hosts",
    "barrier",
    "begin_step",
    "devices_in_use",
    "is_lead",
    "preempted",
    "preempted_within",
    "process_count",
    "process_index",
    "rest",
    "shutdown",
    "start",
    "stoppable",
    "watched",
]


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    settings: Hosts.Config | None = None,
) -> None:
    """Joins the other processes of the run, if there are any, and listens for SIGTERM from here on.

    From then on a lost process ends all others with REQUEUE. JoinError where they do not find each other.

    With no argument the cluster says (Slurm, Cloud TPU, Kubernetes, or `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`
    and `JAX_PROCESS_ID`); where there is no cluster, or for `num_processes=1`, this is a run of one process. A second
    call does nothing. Call it before JAX touches a device; a run of one process may call it later.
    """
    stopping.listen()
    coordinator_address = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if coordinator_address and not coordinator_address.rpartition(":")[2].isdecimal():
        raise JoinError(
            f"the coordinator's address {coordinator_address!r} is not HOST:PORT (JAX_COORDINATOR_ADDRESS)."
        )
    if num_processes is None and coordinator_address:
        num_processes = _said("JAX_NUM_PROCESSES")
    if process_id is None and coordinator_address:
        process_id = _said("JAX_PROCESS_ID")
    if num_processes == 1 or peers.joined():
        return
    if None not in (coordinator_address, num_processes, process_id):
        # All is said: the cluster's environment must not restrict the devices of this process as well.
        detection = "deactivate"
    elif coordinator_address is None and num_processes is None and process_id is None and devices_in_use():
        return
    else:
        detection = None
    try:
        peers.join(coordinator_address, num_processes, process_id, detection, settings or Hosts.Config())
    except ValueError as e:
        if (coordinator_address, num_processes, process_id) != (None, None, None):
            raise JoinError(
                f"cannot join the run: coordinator_address={coordinator_address}, num_processes={num_processes}, "
                f"process_id={process_id} and no cluster that says the rest ({e}). Give all three, as "
                "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or none."
            ) from e
        return  # JAX knows no cluster here: one process, which needs no coordinator
    stopping.joined()


def _said(name: str) -> int | None:
    """A number from the environment, if it is there."""
    text = os.environ.get(name)
    if text is not None and not text.isdecimal():
        raise JoinError(f"{name} is {text!r}; give a number, or unset it.")
    return None if text is None else int(text)


def shutdown() -> None:
    """Leaves the run; every process must call it, and waits for the others. SIGTERM is as it was before `start`."""
    peers.leave()
    stopping.forget()


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


def preempted(step: int, save: Save | None = None) -> bool:
    """Whether the run should save and exit with REQUEUE now: true on every process at the same call, and from then on.

    Every process calls it once after each step, and `begin_step` before the next one: in between a SIGTERM is followed
    by a call of `save` in another thread, and the end of the process. Of several processes none is ended so before all
    have called `rest`; in what they do together till then they ask `preempted_within`.
    """
    due = stopping.asked(step, save)
    return due and _told_to_stop(f"after step {step}")


def preempted_within(what: str) -> bool:
    """As `preempted`, within what several processes do together after a step; False for a process alone."""
    return stopping.asked_within() and _told_to_stop(f"in {what}")


def _told_to_stop(where: str) -> bool:
    if is_lead():
        console.print(f"preempted: SIGTERM was received; the run stops {where}", style="bold yellow")
    return True


def devices_in_use() -> bool:
    """Whether JAX has touched a device, after which neither processes nor devices can be added."""
    from jax._src import xla_bridge  # the check that jax.distributed.initialize makes, which has no public name

    return xla_bridge.backends_are_initialized()
