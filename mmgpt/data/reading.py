"""Reading rows ahead with Grain: threads or worker processes, a share of every batch for each host.

A worker process is told the rows and how to load one, and gives batches back in shared memory. It ends by itself when
its parent has; then Python's resource tracker, a process of its own, unlinks what was on its way.
"""

import atexit
import fcntl
import functools
import json
import logging
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags

from mmgpt.core.errors import UserError

log = logging.getLogger(__name__)

SAMPLES = 1000
"""Samples over which the share of rejects is watched."""
_WATCH_SECONDS = 0.5


class LoaderError(UserError, ValueError):
    """A loader that cannot go on; the message says what was found and what to do."""


class Rejects:
    """Counts what failed at load and writes one {"key", "reason", "place"} line for each, once. Safe in threads and
    between processes that share the file.

    A bad sample never ends a run, but where too many fail the data or the grammar is wrong: more than the share `most`
    of `SAMPLES` samples raises LoaderError.
    """

    def __init__(self, path: Path | None, most: float) -> None:
        self._path, self._most, self._lock = path, most, threading.Lock()
        self._seen, self._read = set[str](), 0
        self._samples = self._failed = 0

    def __len__(self) -> int:
        with self._lock:
            if self._path is not None and self._path.exists():
                with open(self._path, "rb") as file:
                    self._catch_up(file)
            return len(self._seen)

    def __reduce__(self) -> tuple[Any, ...]:
        return Rejects, (self._path, self._most)

    def add(self, key: str, reason: str, place: str) -> None:
        """Notes one failure; `place` tells dataset and document. Raises LoaderError where too many failed."""
        with self._lock:
            self._failed += 1
            if place not in self._seen and self._is_new(key, reason, place):
                log.warning("%s: left out, %s", place, reason)
            self._seen.add(place)
            if self._failed > self._most * SAMPLES:
                raise LoaderError(
                    f"{self._failed} of the last {self._samples + self._failed} samples failed to load, more than "
                    f"max_rejected {self._most} of {SAMPLES} allows. The last: {place}: {reason}. Mend the data or the "
                    "grammar, or allow more."
                )
            self._passed()

    def passed(self) -> None:
        """Notes that a sample loaded."""
        self._samples += 1
        self._passed()

    def _passed(self) -> None:
        if self._samples + self._failed >= SAMPLES:
            self._samples = self._failed = 0

    def _is_new(self, key: str, reason: str, place: str) -> bool:
        """Writes the line unless another process did."""
        if self._path is None:
            return True
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self._catch_up(file)
            if place in self._seen:
                return False
            file.write((json.dumps({"key": key, "reason": reason, "place": place}) + "\n").encode())
            return True

    def _catch_up(self, file: Any) -> None:
        """Reads the lines that other processes, and runs before this one, have written."""
        file.seek(self._read)
        for line in file.read().splitlines(keepends=True):
            if line.endswith(b"\n"):
                self._read += len(line)
                try:
                    self._seen.add(json.loads(line)["place"])
                except (ValueError, KeyError, TypeError):
                    continue  # a line cut by a kill


class Cache:
    """Keeps the first values that fit a byte budget: an epoch visits all alike, so none is worth evicting for."""

    def __init__(self, budget: int) -> None:
        self._values, self._budget, self._room, self._lock = dict[Hashable, Any](), budget, budget, threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Cache, (self._budget,)

    def get(self, key: Hashable, make: Callable[[], Any], size: Callable[[Any], int]) -> Any:
        """The value of `key`, made if it is not kept; `size` gives a value's bytes."""
        value = self._values.get(key)
        if value is None:
            value = make()
            with self._lock:
                if (needed := size(value)) <= self._room and key not in self._values:
                    self._values[key] = value
                    self._room -= needed
        return value


class _Share(Sequence[int]):
    """The rows that one host loads, in order: its part of each global batch is one run of its rows."""

    def __init__(self, start: int, stop: int, batch_rows: int, shard: tuple[int, int]) -> None:
        index, count = shard
        self._part = batch_rows // count
        self._first, self._batch_rows = start + index * self._part, batch_rows
        self._length = (stop - start) // batch_rows * self._part

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        batch, place = divmod(index, self._part)
        return self._first + batch * self._batch_rows + place


def read_ahead(
    load: Callable[[int], dict[str, np.ndarray]],
    *,
    rows: int,
    batch_rows: int,
    start_row: int,
    shard: tuple[int, int],
    threads: int,
    prefetch: int,
    workers: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Rows `start_row` to `rows` by `load`, stacked into this shard's part of each global batch of `batch_rows`.

    `threads` load up to `prefetch` batches ahead, in each of `workers` processes or in this one; what they raise is
    raised here, and a worker that dies is a LoaderError. The last partial batch is dropped.
    """
    index, count = shard
    if not 0 <= index < count or batch_rows % count:
        raise LoaderError(f"shard {index} of {count} cannot take equal parts of {batch_rows} rows; change batch_rows.")
    if not 0 <= start_row <= rows:
        raise LoaderError(f"start row {start_row} is outside the plan's rows 0 to {rows}; ask for more rows.")
    order = _Share(start_row, rows, batch_rows, shard)
    if not len(order):
        return iter(())
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=-(-prefetch // max(1, workers)))
    dataset = grain.MapDataset.source(order).map(load).batch(batch_rows // count).to_iter_dataset(ahead)
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads flags of its own as workers start
        options = grain.multiprocessing.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        dataset = dataset.mp_prefetch(options, functools.partial(_start_worker, os.getpid()))
    batches = _until_closed(iter(dataset), workers > 0)
    _reading.add(batches)
    return batches


_reading: weakref.WeakSet[Generator[dict[str, np.ndarray], None, None]] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Ends workers while the interpreter still stands: what is left of them after that ends in noise."""
    for batches in list(_reading):
        batches.close()


def _until_closed(iterator: grain.DatasetIterator, shared: bool) -> Generator[dict[str, np.ndarray], None, None]:
    try:
        for batch in iterator:
            # A copy lets go of shared memory now, where an array that lives until the end would be called a leak.
            yield {name: np.array(array) for name, array in batch.items()} if shared else batch
    except RuntimeError as e:
        if "terminated unexpectedly" not in str(e):
            raise
        raise LoaderError(
            f"a data worker died ({str(e).partition('. ')[0]}): killed for memory, perhaps. Run the same command "
            "again; it goes on from the last checkpoint. Fewer data.workers or less data.cache_bytes take less memory."
        ) from e
    finally:
        iterator.close()


def _start_worker(parent: int, *_: int) -> None:
    """In a worker process: keeps off accelerators, leaves signals to the parent, and ends when the parent has.

    Ctrl-C and a scheduler's SIGTERM reach every process of a job: the parent then saves, and still needs its workers.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    for asked_to_end in (signal.SIGINT, signal.SIGTERM):
        signal.signal(asked_to_end, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent watch").start()
