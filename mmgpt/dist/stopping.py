"""The notice that the scheduler wants the machines back, and the end of a run after a step that all processes know.

SIGTERM is heard by a thread, so that it does not matter what the main thread is in: a compile, an evaluation, a wait
for data. There it has a state at rest, which the thread saves before it ends the process. Only while a step is being
done is there none; then the main thread learns at the step's end that it must stop. So it does too in an evaluation of
several processes, which they compute together and cannot leave but at the same batch: there it asks before each.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from mmgpt.core.ending import REQUEUE, end
from mmgpt.core.log import console, printable
from mmgpt.dist import peers
from mmgpt.dist.agreement import agree

Save = Callable[[], Any]
"""Saves a state at rest; true when it is saved."""

KEY = "mmgpt/stop"
_STOP_LISTENING = b"\0"


class _Stop:
    """What this process knows of a stop. `changed` guards all but `caught`, which a signal handler sets."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.caught = False
        self.polls = 0
        """Calls of `asked` and `asked_within`; the same on all processes at the same place of a run."""
        self.rests = False
        """Whether nothing changes the state until the next step; there may be nothing to `save`."""
        self.save: Save | None = None
        self.step = 0
        """The last step done, which `save` saves."""
        self.deciding = False
        self.after: int | None = None
        """The poll after which all processes stop."""
        self.ending = False
        self.listening: tuple[int, int, int, Any] | None = None

    def moves_on(self) -> bool:
        """Whether the main thread may; if not, this process is about to end."""
        return not (self.deciding or self.ending)


_stop = _Stop()
os.register_at_fork(after_in_child=lambda: _forked())


def listen() -> None:
    """Hears SIGTERM from here on. Python gives signals to the main thread only; called from another it does nothing."""
    if _stop.listening is not None or threading.current_thread() is not threading.main_thread():
        return
    heard, told = os.pipe()
    os.set_blocking(told, False)
    before = signal.signal(signal.SIGTERM, _on_sigterm)
    _stop.listening = heard, told, signal.set_wakeup_fd(told, warn_on_full_buffer=False), before
    threading.Thread(target=_listen, args=(_stop, heard), name="SIGTERM", daemon=True).start()


def forget() -> None:
    """SIGTERM is as it was before `listen`, and none was received."""
    global _stop
    if _stop.listening is not None and threading.current_thread() is threading.main_thread():
        _, told, wakeup, before = _stop.listening
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
        os.write(told, _STOP_LISTENING)
        os.close(told)
    _stop = _Stop()


def joined() -> None:
    """Hears of another process's SIGTERM too; to be called once this one has joined the others."""
    peers.follow(_follow, "SIGTERM of others")
    if _stop.caught:
        _tell()
    with _stop.changed:
        _stop.changed.notify_all()


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """In here SIGTERM may end the process: at once before the first step, then wherever the state is at rest."""
    listen()
    with _stop.changed:
        _stop.rests, _stop.save = True, None
        _stop.changed.notify_all()
    try:
        yield
    finally:
        with _stop.changed:
            _stop.changed.wait_for(_stop.moves_on)
            _stop.rests, _stop.save = False, None


def begin_step() -> None:
    """From here to the next `asked` the state is not at rest. Before the first step it stays: nothing can be lost."""
    with _stop.changed:
        _stop.changed.wait_for(lambda: _stop.moves_on() and _stop.after != _stop.polls)
        _stop.rests = _stop.rests and _stop.save is None
        _stop.save = None  # it holds the state


def asked(step: int, save: Save | None = None) -> bool:
    """Whether the run should save and exit with REQUEUE now; true on all processes at the same call, and from then on.

    Every process calls it once after each step. Where it is false and the process is alone, `save` may be called in
    another thread until the next `begin_step`, and the process is ended after it; among others, from `rest` on.
    """
    with _stop.changed:
        due = _polled()
        _stop.step, _stop.save = step, save
        _stop.rests = save is not None and not due and not peers.joined()
        _stop.changed.notify_all()
    return due


def asked_within() -> bool:
    """As `asked`, in the midst of what all processes do between two steps; a thread ends a process that is alone."""
    if not peers.joined():
        return False
    with _stop.changed:
        return _polled()


def rest() -> None:
    """From here to the next `begin_step` this process does nothing with others; it may wait for data."""
    with _stop.changed:
        _stop.rests = _stop.rests or _stop.save is not None
        _stop.changed.notify_all()


def _polled() -> bool:
    _stop.changed.wait_for(_stop.moves_on)
    _stop.polls += 1
    return (_stop.after is not None and _stop.polls >= _stop.after) or (_stop.caught and not peers.joined())


def _on_sigterm(number: int, frame: Any) -> None:
    _stop.caught = True


def _listen(stop: _Stop, heard: int) -> None:
    """Waits for the bytes that the interpreter's own handler writes, whatever the main thread is in."""
    with open(heard, "rb", buffering=0) as signals:
        while (number := signals.read(1)) not in (_STOP_LISTENING, b""):
            ours = signal.getsignal(signal.SIGTERM) is _on_sigterm  # or whoever has it now sees to it
            if number == bytes([signal.SIGTERM]) and stop is _stop and ours:
                break
        else:
            return
        threading.Thread(target=_sigterm, args=(stop,), name="stop", daemon=True).start()
        while signals.read(64) not in (_STOP_LISTENING, b""):  # or the interpreter could not write
            pass


def _sigterm(stop: _Stop) -> None:
    with stop.changed:
        stop.caught = True
        if not peers.joined():
            stop.changed.wait_for(lambda: stop.rests or peers.joined())
            stop.ending = not peers.joined()
    if stop.ending:
        _end(stop)
    else:
        _tell()


def _tell() -> None:
    peers.client().key_value_set(KEY, "SIGTERM", allow_overwrite=True)  # wakes `_follow`, here and elsewhere


def _follow() -> None:
    """Agrees on a poll with the other processes once one of them got SIGTERM."""
    stop = _stop
    try:
        peers.client().blocking_key_value_get(KEY, 10**9)
        with stop.changed:
            stop.deciding = True
            reaches = stop.polls if stop.rests else stop.polls + 1
        stop.after = agree("stop", reaches, max)
    except Exception:
        return  # this process leaves, or another is lost, which `peers.py` sees
    finally:
        with stop.changed:
            stop.deciding = False
            stop.changed.notify_all()
    threading.Thread(target=_end_at_rest, args=(stop,), name="stop", daemon=True).start()


def _end_at_rest(stop: _Stop) -> None:
    """Ends the process if it rests at that poll; otherwise the main thread gets there and is told."""
    with stop.changed:
        stop.changed.wait_for(lambda: stop.rests and stop.polls == stop.after)
        stop.ending = True
    _end(stop)


def _end(stop: _Stop) -> None:
    if stop.save is None:
        peers.leave()
        end(REQUEUE, "SIGTERM was received before the first step; run the same command to go on")
    if peers.index() == 0:
        console.print("preempted: SIGTERM was received; the run is saved and stops", style="bold yellow")
    line = ""
    try:
        saved = stop.save()
        if saved and peers.index() == 0:
            line = f"saved at step {stop.step}; run the same command to go on"
    except Exception as e:  # a state that is not worth keeping, such as after a spike: the last checkpoint is
        saved = True
        console.print(f"nothing was saved now: {printable(f'{type(e).__name__}: {e}')}", style="red")
    peers.leave()
    end(REQUEUE if saved else 1, line)


def _forked() -> None:
    """A forked worker inherits the handler, and must still die of SIGTERM and tell nobody."""
    if _stop.listening is not None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
