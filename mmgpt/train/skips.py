"""Rows that a run leaves out: the record in its folder, and the order of its batches, which follows from that alone.

`skips.jsonl` has a line for each time that the run went back. A new run that is given the file trains on the same
batches in the same order, and ends in the same bits.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from mmgpt.core.errors import UserError
from mmgpt.core.log import write_atomic
from mmgpt.dist import hosts
from mmgpt.dist.agreement import together

NAME = "skips.jsonl"


class SkipError(UserError, ValueError):
    """A record of skipped rows that cannot be read; the message says where and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skip:
    """Global rows `first_row` up to, not with, `stop_row`: why they are left out, and the steps that were given up."""

    first_row: int
    stop_row: int
    why: str
    first_step: int
    """The first bad step."""
    last_step: int
    """The last step that was done before the run went back."""
    time: float
    """Seconds since 1970."""


@dataclasses.dataclass(frozen=True)
class Skips:
    """The rows left out of a run of `batch_rows` rows a step; other than that, rows follow each other."""

    batch_rows: int
    found: tuple[Skip, ...] = ()

    @staticmethod
    def load(run_dir: Path, batch_rows: int) -> "Skips":
        """The record of a run folder, empty where there is none. Raises SkipError."""
        path = run_dir / NAME
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return Skips(batch_rows, tuple(_parse(path, batch_rows, *line) for line in enumerate(lines, 1)))

    def save(self, run_dir: Path) -> None:
        """Writes the record; every process calls it."""
        lines = [json.dumps(dataclasses.asdict(skip)) + "\n" for skip in self.found]
        together("write skips", lambda: write_atomic(run_dir / NAME, "".join(lines)) if hosts.is_lead() else None)

    def row(self, step: int) -> int:
        """The global row with which the batch begins that comes after so many steps."""
        row = step * self.batch_rows
        for first, stop in self._ranges():
            if row < first:
                break
            row += stop - first
        return row

    def rows(self, steps: int) -> int:
        """How many rows that many steps see or leave out."""
        return self.row(steps - 1) + self.batch_rows

    def step(self, row: int) -> int:
        """How many steps the rows before `row` make: at what a checkpoint's position must be its own step."""
        skipped = sum(min(stop, row) - first for first, stop in self._ranges() if first < row)
        return (row - skipped) // self.batch_rows

    def kept(self, row: int) -> Iterator[tuple[int, int | None]]:
        """The runs of rows to train on from `row` on: (first, stop), of which the last has no end."""
        for first, stop in self._ranges():
            if row < first:
                yield row, first
            row = max(row, stop)
        yield row, None

    def told(self) -> dict[str, float]:
        """The last one in numbers, for the metrics."""
        last = dataclasses.asdict(self.found[-1])
        numbers = {name: float(last[name]) for name in ("first_row", "stop_row", "first_step", "last_step")}
        return {"rollbacks": float(len(self.found)), **numbers}

    def _ranges(self) -> list[tuple[int, int]]:
        """(first, stop), ascending and apart."""
        ranges: list[tuple[int, int]] = []
        for first, stop in sorted((skip.first_row, skip.stop_row) for skip in self.found):
            if ranges and first <= ranges[-1][1]:
                ranges[-1] = ranges[-1][0], max(ranges[-1][1], stop)
            else:
                ranges.append((first, stop))
        return ranges


def _parse(path: Path, batch_rows: int, number: int, line: str) -> Skip:
    try:
        skip = Skip(**json.loads(line))
        whole = 0 <= skip.first_row < skip.stop_row and skip.first_row % batch_rows == skip.stop_row % batch_rows == 0
    except (ValueError, TypeError) as e:
        raise SkipError(f"{path}:{number}: not a record of skipped rows ({e}). Give the file as it was.") from e
    if not whole:
        raise SkipError(
            f"{path}:{number}: rows {skip.first_row} to {skip.stop_row} are not whole batches of {batch_rows} rows. "
            "Give the file as it was, to a run of the same data.batch_rows."
        )
    return skip
