"""Decoders that do what none may, to see that each is noticed."""

import os
import signal
import time

from tests.fuzz.decoders import Decoder

_HELD: list[bytes] = []


def _now(data: bytes) -> bool:
    """For about one mutant in fifty."""
    return sum(data) % 50 == 7


def _raises(data: bytes) -> str:
    if _now(data):
        raise KeyError("a bug")
    return "decoded"


def _dies(data: bytes) -> str:
    if _now(data):
        os.kill(os.getpid(), signal.SIGSEGV)
    return "decoded"


def _stands(data: bytes) -> str:
    while _now(data):
        time.sleep(1.0)
    return "decoded"


def _crawls(data: bytes) -> str:
    end = time.process_time() + 0.25 * _now(data)
    while time.process_time() < end:
        pass
    return "decoded"


def _grows(data: bytes) -> str:
    if _now(data):
        _HELD.append(b"x" * (220 << 20))
    return "decoded"


def _files() -> list[bytes]:
    return [bytes(40)]


DECODERS = {f.__name__[1:]: Decoder(_files, f) for f in (_raises, _dies, _stands, _crawls, _grows)}
