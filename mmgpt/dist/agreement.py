"""How the processes of a run agree: by JSON values that the coordination service carries.

No device takes part, so a thread beside the training may do it too.
"""

import collections
import json
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from mmgpt.dist import peers

T = TypeVar("T")

TIMEOUT_SECONDS = 1200
"""How long a process is waited for; one that has died is noticed by its missing heartbeat long before."""

_rounds: collections.Counter[str] = collections.Counter()
_counting = threading.Lock()


class Elsewhere(RuntimeError):
    """What another process met."""


def agree(name: str, said: Any, decide: Callable[[list[Any]], Any]) -> Any:
    """What `decide`, called on the lead with what every process said, answers; the same on all processes.

    Every process calls it as often as the others for a `name`; other names may come between and in other threads.
    `decide` must not raise, since the others wait for its answer. Raises what JAX does where a process is lost.
    """
    if peers.count() == 1:
        return decide([said])
    service = peers.client()
    with _counting:
        _rounds[name] += 1
        number = _rounds[name]
    place, wait = f"mmgpt/agree/{name}", TIMEOUT_SECONDS * 1000
    service.key_value_set(f"{place}/{number}/said/{peers.index()}", json.dumps(said))
    if peers.index() == 0:
        keys = [f"{place}/{number}/said/{index}" for index in range(peers.count())]
        answer = decide([json.loads(service.blocking_key_value_get(key, wait)) for key in keys])
        # Whoever speaks in this round has read the answer of the one before: the service need not keep either.
        service.key_value_delete(f"{place}/{number}/said/")
        service.key_value_delete(f"{place}/{number - 1}/")
        service.key_value_set(f"{place}/{number}/answer", json.dumps(answer))
    return json.loads(service.blocking_key_value_get(f"{place}/{number}/answer", wait))


def together(name: str, do: Callable[[], T]) -> T:
    """`do()` on every process. If it raises on one, it does on all: there its own exception, and here Elsewhere."""
    said = ""
    try:
        done = do()
    except Exception as e:
        done, said = e, f"process {peers.index()}: {type(e).__name__}: {e}"
    told = agree(name, said, lambda said: next(filter(None, said), ""))
    if isinstance(done, Exception):
        raise done
    if told:
        raise Elsewhere(told)
    return done
