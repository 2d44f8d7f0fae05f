"""The other processes of a run: joining them, what happens where one is lost, and leaving them.

JAX's coordination service, which the lead hosts, takes a process for lost that sends no heartbeat. Left to itself it
then aborts all others. Here they end with REQUEUE and say which one was lost, since a restart goes on from the newest
checkpoint. Liveness is judged by threads of C++ alone, so that a process is not lost because its Python is busy.
"""

import atexit
import contextlib
import ctypes
import functools
import re
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import distributed  # the service has no public name

from mmgpt.core.config import Config
from mmgpt.core.ending import REQUEUE, end
from mmgpt.core.errors import UserError

PATIENCE = 3.0
"""Seconds by which a lost process is told after its heartbeat was missed at the latest."""
POLL = 0.5
"""Seconds between questions who is alive; each waits until all that are have asked."""
LEAVE_SECONDS = 1200
"""How long a process that is done waits for the others, which may still write an export."""


class JoinError(UserError, RuntimeError):
    """The processes of a run do not find each other; the message says who waited where, and what to look at."""


class Hosts:
    class Config(Config):
        """How the processes of a run find and watch each other.

        A process that is silent for `heartbeat` seconds is lost, and the others end. They wait `join` seconds for each
        other at the start.
        """

        heartbeat: int = 30
        join: int = 300


class _Peers:
    def __init__(self) -> None:
        self.joined = False
        self.heartbeat = 0.0
        self.leaving = False
        """Whether this process waits to leave, or leaves without a word since it failed."""
        self.parted = threading.Event()
        """Set when all are about to leave: nobody is lost any more."""
        self.alone = threading.Event()
        self.goes, self.gone = threading.Event(), threading.Event()
        """Set where this process begins to leave the service, and where it has left."""
        self.failed = False
        self.threads: list[threading.Thread] = []


_peers = _Peers()


def joined() -> bool:
    """Whether this process is one of several, and has found the others."""
    return _peers.joined


def index() -> int:
    """Number of this process, without touching a device."""
    return distributed.global_state.process_id


def count() -> int:
    """Number of processes, without touching a device."""
    return distributed.global_state.num_processes if distributed.global_state.client is not None else 1


def client() -> Any:
    """The coordination service's client."""
    assert distributed.global_state.client is not None
    return distributed.global_state.client


def join(
    address: str | None, processes: int | None, number: int | None, detection: str | None, settings: Hosts.Config
) -> None:
    """`jax.distributed.initialize`, and the watch on the others. JoinError; ValueError where JAX knows no cluster.

    Where somebody else has initialized it, and in another way, the coordinator's loss is an abort.
    """
    if not jax.distributed.is_initialized():
        _initialize(address, processes, number, detection, settings)
    _peers.joined, _peers.heartbeat = True, settings.heartbeat
    follow(_watch, "peers")
    threading.Thread(target=_not_stuck, args=(_peers,), name="leaving", daemon=True).start()
    atexit.register(_at_exit)  # after JAX's own, and so called before it


def _initialize(
    address: str | None, processes: int | None, number: int | None, detection: str | None, settings: Hosts.Config
) -> None:
    # A SIGTERM is told by `stopping.py`, which hears it in a compile as well.
    jax.config.update("jax_enable_preemption_service", False)
    # Whoever is recoverable is not ended by the service for the loss of another one, but may ask who is alive.
    jax.config.update("jax_enable_recoverability", True)
    library: Any = vars(distributed)["_jax"]
    make = library.get_distributed_runtime_client
    library.get_distributed_runtime_client = functools.partial(make, missed_heartbeat_callback=_lead_is_lost)
    _catch_terminate()
    try:
        jax.distributed.initialize(
            address,
            processes,
            number,
            cluster_detection_method=detection,
            initialization_timeout=settings.join,
            heartbeat_timeout_seconds=settings.heartbeat,
        )
    except RuntimeError as e:
        told = _unmet(settings)
        state: Any = distributed.global_state
        for part in filter(None, (state.client, state.service)):  # whose noise must not follow what is told here
            with contextlib.suppress(RuntimeError):
                part.shutdown()
        state.client = state.service = None
        raise JoinError(told) from e
    finally:
        library.get_distributed_runtime_client = make


def follow(do: Any, name: str) -> None:
    """Runs `do` in a thread that waits for the service, and so ends when this process leaves."""
    _peers.threads.append(threading.Thread(target=do, name=name, daemon=True))
    _peers.threads[-1].start()


def leave(*, failed: bool = False) -> None:
    """Waits until all others are done too, the lead until they have gone; or, having failed, for nobody."""
    global _peers
    if not _peers.joined:
        return
    atexit.unregister(_at_exit)
    _peers.leaving, _peers.failed = True, failed
    if not failed:
        with watched():
            client().wait_at_barrier("mmgpt/leave", LEAVE_SECONDS * 1000)
        _peers.parted.set()
        if index() == 0:
            _peers.alone.wait(_peers.heartbeat + PATIENCE)
    _peers.goes.set()
    jax.distributed.shutdown()
    _peers.gone.set()
    for thread in _peers.threads:  # one that is in the client when the interpreter ends would crash it
        thread.join(PATIENCE)
    _peers = _Peers()


def _not_stuck(peers: _Peers) -> None:
    """Ends a process that does not get away: where the lead is lost as it leaves, the client waits for itself.

    The thread is there from the start, since none can be begun as the interpreter ends.
    """
    peers.goes.wait()
    if not peers.gone.wait(PATIENCE):
        end(1 if peers.failed else REQUEUE)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Where a device or the service fails in here because another process is lost, this one ends as `_lost` says.

    A connection breaks long before its process is known to be lost. An error of one's own is passed on at once.
    """
    try:
        yield
    except BaseException as e:
        if _peers.joined and _is_of_the_runtime(e):
            time.sleep(_peers.heartbeat + PATIENCE)
        _peers.failed = True
        raise


def _is_of_the_runtime(error: BaseException | None) -> bool:
    """Whether XLA or the service said it: "UNAVAILABLE: ...", "UNKNOWN: Gloo AllGather failed: ..."."""
    if error is None:
        return False
    status = isinstance(error, (jax.errors.JaxRuntimeError, ValueError)) and re.match(r"[A-Z_]{5,}: ", str(error))
    return bool(status) or _is_of_the_runtime(error.__cause__)


def _watch() -> None:
    """Ends this process when another is lost, until all part."""
    mine, everyone = _peers, set(range(count()))
    first: dict[int, int] = {}
    while True:
        try:
            found = client().get_live_nodes(sorted(everyone))
        except Exception:  # the service is gone, and process 0 with it
            found = {}
        first = first or found
        # One that was started again beside its others knows nothing of them: it has another number.
        alive = {number for number in found if found[number] == first.get(number)}
        if alive != everyone:
            _lost(everyone - alive if found else {0})
        if alive == {0}:
            mine.alone.set()
        if (mine.parted.is_set() and (index() != 0 or mine.alone.is_set())) or (mine.leaving and mine.failed):
            return
        time.sleep(POLL)


def _lost(who: set[int]) -> None:
    """Ends this process, unless it is about to end anyway."""
    if _peers.failed and not _peers.leaving:
        time.sleep(PATIENCE)  # it tells its own error, and has its own code
    if _peers.leaving and (_peers.failed or _peers.parted.wait(PATIENCE / 2)):
        return
    names = " and ".join(f"process {number}" for number in sorted(who))
    end(
        REQUEUE,
        f"{names} of {count()} {'was' if len(who) == 1 else 'were'} lost, so process {index()} ends; run the same "
        "command to go on from the newest checkpoint",
    )


def _lead_is_lost(*status: object) -> None:
    """What the client calls, in a thread of its own and holding its lock, when it no longer reaches the service."""
    _lost({0})
    threading.Event().wait()  # the client would end the process


def _catch_terminate() -> None:
    """Makes good for a fault of jaxlib: its Python callback's argument cannot be converted, and it calls terminate."""
    with contextlib.suppress(OSError, AttributeError):  # where there is another C++ library, it ends with an abort
        library = ctypes.CDLL("libstdc++.so.6")
        current, install = library.__cxa_current_exception_type, library._ZSt13set_terminatePFvvE
        handler = ctypes.CFUNCTYPE(None)
        current.restype, install.restype, install.argtypes = ctypes.c_void_p, handler, [handler]

        def terminated() -> None:
            info = current()
            # A std::type_info is its table of functions and its name.
            if info and ctypes.cast(ctypes.c_void_p.from_address(info + 8).value or 0, ctypes.c_char_p).value == _CAST:
                _lead_is_lost()
            before()

        global _terminated
        if _terminated is None:
            _terminated = handler(terminated)
            before = install(_terminated)


_CAST = b"St8bad_cast"
_terminated: Any = None


def _unmet(settings: Hosts.Config) -> str:
    state = distributed.global_state
    address, number, processes = state.coordinator_address, state.process_id, state.num_processes
    if number == 0:
        what = f"process 0 of {processes} waited at {address} for the others, and not all came"
        do = "See the others' logs, and that they are given this address and the same number of processes"
    else:
        what = f"process {number} of {processes} did not reach process 0 at {address}, or not all others came"
        do = "See that process 0 runs there, its port is open, and all are given the same number of processes"
    return f"{what}, within {settings.join} s. {do}; hosts.join is how long they wait."


def _at_exit() -> None:
    leave(failed=_peers.failed or hasattr(sys, "last_value"))
