"""What a run tells: console lines, progress, metrics and samples; and files written whole or not at all."""

import contextlib
import errno
import io
import json
import math
import os
import re
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from tensorboardX import summary
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

PLAIN_WIDTH = 200
"""Columns of a log file, which has no width of its own."""
PROGRESS_SECONDS = 10.0
"""Time between progress lines when the console is not a terminal."""

RATE_SECONDS = 600.0
"""Time over which a bar's estimate of the end looks back: a step may be a shard that takes minutes."""

T = TypeVar("T")

console = Console(stderr=True, highlight=False, markup=False, width=None if sys.stderr.isatty() else PLAIN_WIDTH)
"""Everything the package says to a person goes here, to stderr; stdout is for results."""


def table(title: str, rows: dict[str, dict[str, Any]]) -> Table:
    """Rows of named values; values are shown as JSON."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    made = Table("", *columns, title=title)
    for name, row in rows.items():
        made.add_row(name, *(json.dumps(row[c]) if c in row else "" for c in columns))
    return made


def show(result: RenderableType) -> None:
    """Prints a result, such as a table, to stdout."""
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH).print(result)


def printable(text: str, limit: int = 500) -> str:
    """Foreign text (a caption, a file name) made safe for the console: what a terminal would obey is escaped.

    A caption may hold escape sequences and text-direction marks. Markup needs no care: the console reads none.
    """
    shown = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def progress(items: Iterable[T], *, total: int | None = None, label: str = "") -> Iterator[T]:
    """Yields the items with a bar on a terminal, and with a line every ten seconds and at the end elsewhere."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with counter(total, label=label) as advance:
        for item in items:
            yield item
            advance(1)


@contextlib.contextmanager
def counter(total: int | None, *, label: str = "", done: int = 0) -> Iterator[Callable[[int], None]]:
    """Shows how much is done as `progress` does; what it gives adds to that. `done` is of an earlier process."""
    show = _bar if console.is_terminal else _lines
    with show(total, label, done) as advance:
        yield advance


@contextlib.contextmanager
def _bar(total: int | None, label: str, done: int) -> Iterator[Callable[[int], None]]:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    text = TextColumn("{task.description}", markup=False)
    with Progress(text, *columns, console=console, speed_estimate_period=RATE_SECONDS) as bar:
        task = bar.add_task(label, total=total, completed=done)
        yield lambda count: bar.advance(task, count)


@contextlib.contextmanager
def _lines(total: int | None, label: str, done: int) -> Iterator[Callable[[int], None]]:
    of = "" if total is None else f"/{total}"
    start = said = time.monotonic()
    now_done = done

    def advance(count: int) -> None:
        nonlocal now_done, said
        now_done += count
        if (now := time.monotonic()) - said >= PROGRESS_SECONDS:
            said = now
            rate = (now_done - done) / (now - start)
            left = f", {_duration((total - now_done) / rate)} left" if total and rate > 0 else ""
            console.print(f"{label}: {now_done}{of}, {rate:.3g}/s{left}")

    yield advance
    console.print(f"{label}: {now_done}{of} in {time.monotonic() - start:.1f} s")


def _duration(seconds: float) -> str:
    """`3:05:20`, and `2 days, 3:05:20`."""
    return str(timedelta(seconds=round(max(0.0, seconds))))


def check_writable(*paths: Path | None) -> None:
    """OSError, which names the path, unless files can be written there: to be called before work that it ends.

    Nothing is made there, nor are folders above it.
    """
    for path in filter(None, paths):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder, not a file", str(path))
        try:
            there = next(folder for folder in path.absolute().parents if folder.exists())
            if not there.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, f"{there} is no folder")
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            error.filename = str(path)
            raise


def write_atomic(path: Path, data: bytes | str) -> None:
    """Writes a file that appears whole under its name, or not at all; raises OSError and leaves nothing else."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # a failed write names no file
        raise


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON, atomically; NaN and infinities, which JSON has not, raise ValueError."""
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, oldest first; a last line that a kill cut short is left out.

    Each has `step`, `kind`, `time` (seconds since 1970) and its values. An unreadable line elsewhere raises ValueError.
    """
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        record = _parse(line)
        if record is None:
            raise ValueError(f"{path}:{number}: not a metrics line, found {line[:60]!r}. Delete that line.")
        found.append(record)
    return found


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int) or "kind" not in record:
        return None
    return {k: float(v) if v in ("NaN", "Infinity", "-Infinity") else v for k, v in record.items()}


def _number(value: float) -> float | str:
    value = float(value)
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


class _Appended:
    """A file that grows by whole pieces: what a full disk lets in of a piece is cut off again."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        self.truncate = self._file.truncate
        self.close = self._file.close

    def size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def append(self, piece: bytes) -> None:
        before, written = self.size(), 0
        try:
            written = self._file.write(piece)
        finally:
            if written != len(piece):
                self.truncate(before)
        if written != len(piece):
            raise OSError(f"{self._file.name}: only {written} of {len(piece)} bytes could be written")


def _record(data: bytes) -> bytes:
    """The frame of a TensorBoard event: length, its masked crc, data, its masked crc (TFRecord)."""

    def masked(part: bytes) -> bytes:
        crc = crc32c(part)
        return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)

    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


class Metrics:
    """The figures and samples of a run: `metrics.jsonl`, `samples/` and TensorBoard events under `tensorboard/`.

    Numbers that JSON has not are written as the strings "NaN", "Infinity", "-Infinity" and read back as floats. A full
    disk costs lines, never the run: the console says so, and writing goes on when there is space again.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "metrics.jsonl"
        directory.mkdir(parents=True, exist_ok=True)
        self._lost = 0
        self._lines = _Appended(self.path)
        self._lines.truncate(self.path.read_bytes().rfind(b"\n") + 1)  # what a kill left of a line
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{time.time_ns()}"
        self._events = _Appended(directory / "tensorboard" / name)

    def write(self, step: int, values: dict[str, float], kind: str = "train") -> None:
        """Appends one line of values for a step and the same as TensorBoard scalars `kind/name`."""
        if clash := values.keys() & {"step", "kind", "time"}:
            raise ValueError(f"metrics of step {step}: {', '.join(sorted(clash))} is a column of its own; rename it.")
        record = {"step": int(step), "kind": kind, "time": round(time.time(), 3)}
        line = json.dumps(record | {k: _number(v) for k, v in values.items()}, allow_nan=False) + "\n"
        self._attempt(lambda: self._lines.append(line.encode()))
        self._tell(
            step, Summary(value=[Summary.Value(tag=f"{kind}/{k}", simple_value=float(v)) for k, v in values.items()])
        )

    def image(self, step: int, name: str, picture: np.ndarray) -> Path:
        """Writes `picture` uint8 [H, W, 3] (or [H, W]) as PNG under `samples/` and to TensorBoard; returns its path."""
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3):
            raise ValueError(f"image {name!r}: expected uint8 [H, W, 3], found {picture.dtype} {picture.shape}.")
        path = self._sample(step, name, "png")
        self._attempt(lambda: _write_png(path, picture))
        self._tell(step, summary.image(name, picture, dataformats="HWC" if picture.ndim == 3 else "HW"))
        return path

    def text(self, step: int, name: str, text: str) -> Path:
        """Writes a text under `samples/` and to TensorBoard; returns its path."""
        path = self._sample(step, name, "txt")
        self._attempt(lambda: write_atomic(path, text.encode("utf-8", "backslashreplace")))
        self._tell(step, summary.text(name, text.encode("utf-8", "backslashreplace").decode()))
        return path

    def truncate(self, after_step: int, again: Sequence[str] = ()) -> int:
        """Drops the lines of steps after `after_step`, so that a continued run has none twice; returns how many.

        And of the step itself the kinds that will be told `again`.
        """
        kept, dropped = [], 0
        for line in self.path.read_bytes().split(b"\n")[:-1]:
            record = _parse(line)
            if record is not None and record["step"] <= after_step - (record["kind"] in again):
                kept.append(line + b"\n")
            else:
                dropped += 1
        if dropped:
            write_atomic(self.path, b"".join(kept))
            self._lines.close()
            self._lines = _Appended(self.path)
        # TensorBoard forgets, at a session start, all events from its step on.
        start = Event(step=after_step + 1, wall_time=time.time(), session_log=SessionLog(status=SessionLog.START))
        self._attempt(lambda: self._append_event(start))
        return dropped

    def close(self) -> None:
        self._lines.close()
        self._events.close()

    def _sample(self, step: int, name: str, suffix: str) -> Path:
        return self.directory / "samples" / f"{step:08d}-{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)[:80]}.{suffix}"

    def _tell(self, step: int, told: Any) -> None:
        event = Event(step=step, wall_time=time.time(), summary=told)
        self._attempt(lambda: self._append_event(event))

    def _append_event(self, event: Event) -> None:
        # Not by tensorboardX.SummaryWriter: on a full disk its thread dies, its queue fills up, and the run stands.
        data = _record(event.SerializeToString())
        if self._events.size() == 0:
            data = _record(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString()) + data
        self._events.append(data)

    def _attempt(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as e:
            self._lost += 1
            if self._lost.bit_count() == 1:  # said at 1, 2, 4, 8, ...: a disk may be full for days
                what = f"metrics: {self._lost} writes lost ({printable(str(e))}). The run goes on; free space."
                console.print(what, style="bold red")


class Untold(Metrics):
    """Metrics of a process that is not the lead: nothing is written."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def write(self, step: int, values: dict[str, float], kind: str = "train") -> None:
        pass

    def truncate(self, after_step: int, again: Sequence[str] = ()) -> int:
        return 0

    def close(self) -> None:
        pass


def _write_png(path: Path, picture: np.ndarray) -> None:
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "PNG")
    write_atomic(path, data.getvalue())
