"""What a run's time goes to, over all its lives: `goodput` is the share that went to steps that count."""

import json
import time
from pathlib import Path
from typing import Any

from mmgpt.core.log import console

KINDS = ("start", "compile", "data", "steps", "replay", "save", "evaluate", "lost")
"""Where time goes. `data` is spent waiting for a batch, `save` until the arrays are copied. `lost` are steps that were
done again, and the time between the last metrics of a life and the start of the next."""
LINE = "goodput"
"""Kind of the metrics lines."""
_TAIL = 1 << 20


class Clock:
    """Gives every moment of the process to one kind, and goes on with what earlier lives have spent."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0)
        self._kind, self._since = "start", time.perf_counter()

    def to(self, kind: str) -> None:
        """From now on time is spent on this; call it when the device is done with what was before."""
        now = time.perf_counter()
        self._seconds[self._kind] += now - self._since
        self._kind, self._since = kind, now

    def seconds(self) -> dict[str, float]:
        """Seconds of each kind until now."""
        self.to(self._kind)
        return dict(self._seconds)

    def begin(self, kept: dict[str, float], before: float) -> None:
        """A life begins whose run has spent `before` seconds, of which those in `kept` count, by a checkpoint."""
        own = self.seconds()
        self._seconds = {kind: own[kind] + kept.get(kind, 0.0) for kind in KINDS}
        self._seconds["lost"] += max(0.0, before - sum(kept.values()))

    def go_back(self, kept: dict[str, float]) -> None:
        """What was spent since a checkpoint, which kept this, is lost."""
        spent = sum(self.seconds().values())
        self._seconds = {kind: kept.get(kind, 0.0) for kind in KINDS}
        self._seconds["lost"] += spent - sum(self._seconds.values())

    def figures(self) -> dict[str, float]:
        """The metrics line: `goodput`, and seconds by kind."""
        seconds = self.seconds()
        named = {f"seconds/{kind}": round(value, 3) for kind, value in seconds.items()}
        return {"goodput": seconds["steps"] / max(sum(seconds.values()), 1e-9), **named}

    def tell(self) -> None:
        """One line for a person."""
        seconds = self.seconds()
        whole = max(sum(seconds.values()), 1e-9)
        parts = ", ".join(f"{kind} {value / whole:.1%}" for kind, value in seconds.items() if value / whole >= 5e-4)
        console.print(f"goodput {seconds['steps'] / whole:.1%} of {whole:.0f} s ({parts})")


class Rates:
    """What the steps took since the last reading, by the clock: (steps, seconds, seconds of them waiting for data)."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._step, self._before = clock, 0, clock.seconds()

    def read(self, step: int) -> tuple[int, float, float]:
        """The steps up to `step`; the device must be done with them."""
        now = self._clock.seconds()
        wait = now["data"] - self._before["data"]
        reading = step - self._step, now["steps"] - self._before["steps"] + wait, wait
        self._step, self._before = step, now
        return reading


def spent(metrics: Path, finished: bool) -> float:
    """Seconds that a run has spent by its metrics, until now unless it had `finished`; 0 where they do not say."""
    if not metrics.exists():
        return 0.0
    with open(metrics, "rb") as file:
        file.seek(max(0, file.seek(0, 2) - _TAIL))
        lines = file.read().split(b"\n")
    for line in reversed(lines):
        record = _record(line)
        if record is not None:
            known = sum(record[f"seconds/{kind}"] for kind in KINDS)
            return known if finished else known + max(0.0, time.time() - record["time"])
    return 0.0


def _record(line: bytes) -> dict[str, Any] | None:
    """A goodput line; None for any other, and for what a kill left of one."""
    try:
        found = json.loads(line)
        return found if found["kind"] == LINE and all(f"seconds/{kind}" in found for kind in KINDS) else None
    except (ValueError, KeyError, TypeError):
        return None
