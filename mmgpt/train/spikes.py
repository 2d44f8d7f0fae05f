"""Where a run's loss leaves its path: judged by the losses of the steps before, which are read where the log is."""

from collections import deque
from collections.abc import Collection
from typing import Any

import jax
import numpy as np

from mmgpt.core import config

WINDOW = 128
"""Good steps that the next one is compared with; half as many must be there before a loss is judged at all."""
LEAST = 0.01
"""A robust standard deviation counts as this share of the median at least, where all losses are much the same."""


class Spike(Exception):
    """A run of bad steps: the `first` of them, the `last` step done, and what was seen."""

    def __init__(self, first: int, last: int, why: str) -> None:
        super().__init__(f"steps {first} to {last}: {why}")
        self.first, self.last, self.why = first, last, why


class Spikes:
    """Watches the losses of a run; every process sees the same ones and so comes to the same end.

    `fresh` are the steps with which another mixture begins, whose losses are not compared with those before.
    """

    class Config(config.Config):
        """A step is bad whose gradients are not finite, or whose loss is far above those of the good steps before it.

        Far are `deviations` robust standard deviations (1.4826 times the median distance from the median); None judges
        no finite loss. `in_a_row` bad steps are a spike: the run goes back to a checkpoint from before and leaves out
        `skip` batches around it (PaLM: 200 to 500, arXiv 2204.02311), at most `rollbacks` times.
        """

        deviations: float | None = 10.0
        in_a_row: int = 5
        skip: int = 200
        rollbacks: int = 10

        def build(self, fresh: Collection[int] = ()) -> "Spikes":
            """ConfigError on numbers that watch nothing."""
            for name, value, least in (("in_a_row", self.in_a_row, 1), ("skip", self.skip, 1)):
                if value < least:
                    raise config.ConfigError(f"spikes.{name} is {value}; it must be at least {least}.")
            if self.rollbacks < 0 or (self.deviations is not None and not self.deviations > 0):
                raise config.ConfigError("spikes.rollbacks must be 0 or more, and spikes.deviations above 0 or None.")
            return Spikes(self, fresh)

    def __init__(self, settings: Config, fresh: Collection[int] = ()) -> None:
        self._settings, self._fresh = settings, frozenset(fresh)
        self._pending: list[tuple[int, jax.Array, jax.Array]] = []
        self._good: deque[float] = deque(maxlen=WINDOW)
        self._first = self._last = self._bad = self._skipped = 0
        self._why = ""

    def add(self, step: int, values: dict[str, jax.Array]) -> None:
        """Notes a step that was given to the device; nothing waits for it here."""
        self._pending.append((step, values["loss"], values["skipped"]))

    def read(self) -> int:
        """Waits for the steps noted; how many of them, since the last call, were skipped. Raises Spike."""
        self._catch_up()
        if self._found():
            raise Spike(self._first, self._last, self._why)
        skipped, self._skipped = self._skipped, 0
        return skipped

    def memory(self) -> dict[str, Any]:
        """What a checkpoint keeps, as plain values, so that a run judges alike wherever it goes on."""
        self._catch_up()
        return {"good": list(self._good), "bad": self._bad, "first": self._first, "last": self._last, "why": self._why}

    def recall(self, memory: dict[str, Any] | None) -> None:
        """Goes on from what a checkpoint kept, or from nothing."""
        known = memory or {"good": [], "bad": 0, "first": 0, "last": 0, "why": ""}
        self._good = deque(known["good"], WINDOW)
        self._bad, self._first, self._last, self._why = (known[name] for name in ("bad", "first", "last", "why"))
        self._pending, self._skipped = [], 0

    def _found(self) -> bool:
        return self._bad >= self._settings.in_a_row

    def _catch_up(self) -> None:
        pending, self._pending = self._pending, []
        read = jax.device_get([(loss, skipped) for _, loss, skipped in pending])
        for (step, *_), (loss, skipped) in zip(pending, read, strict=True):
            self._skipped += bool(skipped)
            self._judge(step, float(loss), bool(skipped))

    def _judge(self, step: int, loss: float, skipped: bool) -> None:
        self._last = step
        if self._found():  # a spike is one, whatever came after it before anybody looked
            return
        if step in self._fresh:
            self._good.clear()
        high = self._limit()
        if not skipped and not loss > high:
            self._good.append(loss)
            self._bad = 0
            return
        self._first = step if not self._bad else self._first
        self._bad += 1
        self._why = "gradients that are not finite" if skipped else f"a loss of {loss:.4g}, above {high:.4g}"

    def _limit(self) -> float:
        """The highest loss of a good step."""
        if self._settings.deviations is None or len(self._good) < WINDOW // 2:
            return float("inf")
        good = np.array(self._good)
        middle = float(np.median(good))
        deviation = max(1.4826 * float(np.median(np.abs(good - middle))), LEAST * abs(middle))
        return middle + self._settings.deviations * deviation
