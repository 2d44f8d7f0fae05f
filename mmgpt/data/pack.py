"""The pack plan, which documents go into which row, and the assembly of one row.

A plan is made by best fit: each document goes into the open row that it fills best. When a new row is needed while
`OPEN_ROWS` are open, the fullest closes, or the oldest once `MAX_AGE` rows have opened after it. Rows are numbered as
they close, so the first R rows are the same however many are asked for.
"""

import bisect
import dataclasses
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mmgpt.core.errors import UserError
from mmgpt.data import mixture
from mmgpt.data.mixture import Draws, Source
from mmgpt.tokens.grammars.grammar import Tokens

OPEN_ROWS = 64
MAX_AGE = 4 * OPEN_ROWS
"""Rows that may open after a row before that row closes, full or not."""

_ROW_BITS = 32  # room << 32 | row number: one integer that sorts by room first
_ROW = (1 << _ROW_BITS) - 1


class PlanError(UserError, ValueError):
    """A plan that cannot be made, saved or loaded; the message says what was found and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """R packed rows: row r holds `draws[row_offset[r]:row_offset[r + 1]]`, in that order.

    `sources`: names by number in `draws.source`; a changed mixture adds its sources anew, so a name may occur twice.
    `rejected`: source -> reason -> documents that no row holds.
    """

    row_length: int
    row_offset: np.ndarray
    draws: Draws
    sources: tuple[str, ...]
    rejected: dict[str, dict[str, int]]

    def __len__(self) -> int:
        return len(self.row_offset) - 1

    def row(self, row: int) -> Draws:
        """What one row holds."""
        return self.draws.take(slice(int(self.row_offset[row]), int(self.row_offset[row + 1])))

    def summary(self) -> dict[str, object]:
        """Rows, fill, and by source the tokens, documents and last epoch; plain values."""
        by_source: dict[str, dict[str, int]] = {}
        for number, name in enumerate(self.sources):
            mine = self.draws.source == number
            entry = by_source.setdefault(name, {"tokens": 0, "documents": 0, "epochs": 0})
            entry["tokens"] += int(self.draws.length[mine].sum())
            entry["documents"] += int(mine.sum())
            entry["epochs"] = max(entry["epochs"], int(self.draws.epoch[mine].max(initial=-1)) + 1)
        fill = int(self.draws.length.sum(dtype=np.int64)) / max(1, len(self) * self.row_length)
        return {"rows": len(self), "fill": fill, "sources": by_source, "rejected": self.rejected}

    def save(self, directory: Path) -> None:
        """Writes the plan as a new folder of .npy files; it appears whole or not at all."""
        if directory.exists():
            raise PlanError(f"{directory}: exists already. Remove it or name another folder for the plan.")
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        try:
            np.save(temporary / "row_offset.npy", self.row_offset)
            for field in dataclasses.fields(Draws):
                np.save(temporary / f"{field.name}.npy", getattr(self.draws, field.name))
            meta = {"row_length": self.row_length, "sources": self.sources, "rejected": self.rejected}
            (temporary / "plan.json").write_text(json.dumps(meta))
            os.rename(temporary, directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    @classmethod
    def load(cls, directory: Path) -> "Plan":
        """A saved plan, its arrays memory-mapped."""
        try:
            meta = json.loads((directory / "plan.json").read_text())
            arrays = {f.name: _mapped(directory / f"{f.name}.npy") for f in dataclasses.fields(Draws)}
            return cls(
                row_length=meta["row_length"],
                row_offset=_mapped(directory / "row_offset.npy"),
                draws=Draws(**arrays),
                sources=tuple(meta["sources"]),
                rejected=meta["rejected"],
            )
        except (OSError, EOFError, KeyError, ValueError) as e:  # EOFError: an empty .npy file
            raise PlanError(f"{directory}: not a saved plan ({e}). Make the plan again and save it.") from e


def _mapped(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


class Packer:
    """Best fit over a bounded set of open rows; an item is the number of the call's order, from 0 on."""

    def __init__(self, row_length: int) -> None:
        self.closed: list[list[int]] = []
        self._row_length, self._items = row_length, 0
        self._open: list[int] = []  # ascending room << _ROW_BITS | row
        self._members: dict[int, list[int]] = {}
        self._rows = itertools.count()

    def add(self, lengths: Sequence[int], limit: int | None = None) -> int:
        """Places items one after another, each at most a row long, until `limit` rows are closed; how many it took."""
        room_list, members, first = self._open, self._members, self._items
        if (longest := max(lengths, default=0)) > self._row_length:
            raise PlanError(
                f"an item of {longest} tokens fits no row of {self._row_length}. Build the sources for this row."
            )
        for length in lengths:
            if limit is not None and len(self.closed) >= limit:
                break
            at = bisect.bisect_left(room_list, length << _ROW_BITS)
            if at < len(room_list):
                entry = room_list.pop(at)
            else:
                if len(room_list) == OPEN_ROWS:
                    self._close()
                entry = (self._row_length << _ROW_BITS) | next(self._rows)
            members.setdefault(entry & _ROW, []).append(self._items)
            bisect.insort(room_list, entry - (length << _ROW_BITS))
            self._items += 1
        return self._items - first

    def flush(self) -> None:
        """Closes every open row, fullest first."""
        while self._open:
            self._close()

    def _close(self) -> None:
        newest, oldest = next(reversed(self._members), 0), next(iter(self._members))
        place = 0  # the fullest
        if newest - oldest >= MAX_AGE:
            place = next(i for i, entry in enumerate(self._open) if entry & _ROW == oldest)
        self.closed.append(self._members.pop(self._open.pop(place) & _ROW))


def plan(
    sources: Sequence[Source],
    *,
    seed: int,
    row_length: int,
    rows: int,
    changes: Sequence[tuple[int, Sequence[Source]]] = (),
) -> Plan:
    """The first `rows` rows of a mixture. The same row comes out whatever `rows` is.

    `changes`: (row, sources) in ascending order of row: once that many rows are closed, further documents come from
    the new mixture, every source going on from its own cursor.
    """
    phases = [(0, sources), *(change for change in changes if change[0] < rows)]
    starts = [start for start, _ in phases]
    if starts != sorted(set(starts)):
        raise PlanError(f"mixture changes start at rows {starts[1:]}; rows must ascend and be above 0.")
    if rows < 1:
        raise PlanError(f"a plan needs at least one row, found rows={rows}.")
    packer, cursors, taken, number = Packer(row_length), dict[str, int](), list[Draws](), 0
    for (_, phase), stop in zip(phases, [*starts[1:], rows], strict=True):
        for draws in mixture.merged(phase, seed, first=dict(cursors), number=number):
            used = draws.take(slice(0, packer.add(draws.length.tolist(), stop)))
            taken.append(used)
            for i, source in enumerate(phase):
                cursors[source.name] = cursors.get(source.name, 0) + int((used.source == number + i).sum())
            if len(used) < len(draws) or len(packer.closed) >= stop:
                break
        number += len(phase)
    return _finished(packer.closed[:rows], Draws.join(taken), [s for _, p in phases for s in p], row_length)


def plan_once(source: Source, *, row_length: int) -> Plan:
    """Every document of one source once, in the order of their numbers and in plain layout: for held-out data."""
    documents = source.documents
    draws = Draws(
        source=np.zeros(len(documents), np.uint16),
        document=documents,
        epoch=np.zeros(len(documents), np.int32),
        flags=np.zeros(len(documents), np.uint8),
        length=source.lengths.full[documents].astype(np.int32),
    )
    packer = Packer(row_length)
    packer.add(draws.length.tolist())
    packer.flush()
    return _finished(packer.closed, draws, [source], row_length)


def _finished(closed: list[list[int]], draws: Draws, sources: Sequence[Source], row_length: int) -> Plan:
    counts = np.fromiter((len(row) for row in closed), np.int64, len(closed))
    return Plan(
        row_length=row_length,
        row_offset=np.concatenate(([0], np.cumsum(counts))),
        draws=draws.take(np.fromiter(itertools.chain.from_iterable(closed), np.int64, int(counts.sum()))),
        sources=tuple(source.name for source in sources),
        rejected={source.name: source.rejected for source in sources if source.rejected},
    )


def assemble(
    documents: Iterator[Tokens | int] | Sequence[Tokens | int], row_length: int, pad: int
) -> dict[str, np.ndarray]:
    """One row of T = `row_length` tokens: `ids target modality document` int32 [T], `position` int32 [T, 5],
    `weight` float32 [T].

    `target[t]` is the next id of the same document and `weight[t]` that id's loss weight, 0 on a document's last
    token. `position` is the number in the document, then the row and column in the picture of the id and of the next
    id. An integer in place of a document leaves a gap of that many tokens. Gaps and the rest of the row are padding:
    id `pad`, weight 0, document -1.
    """
    row = {
        "ids": np.full(row_length, pad, np.int32),
        "target": np.full(row_length, pad, np.int32),
        "modality": np.zeros(row_length, np.int32),
        "position": np.zeros((row_length, 5), np.int32),
        "document": np.full(row_length, -1, np.int32),
        "weight": np.zeros(row_length, np.float32),
    }
    at = 0
    for number, tokens in enumerate(documents):
        end = at + (tokens if isinstance(tokens, int) else len(tokens.ids))
        if end > row_length:
            raise PlanError(
                f"document {number} ends at token {end} of a row of {row_length}: the plan's lengths are wrong."
            )
        if not isinstance(tokens, int) and end > at:
            row["ids"][at:end] = tokens.ids
            row["target"][at : end - 1] = tokens.ids[1:]
            row["weight"][at : end - 1] = tokens.weight[1:]
            row["modality"][at:end] = tokens.modality
            row["position"][at:end, 0] = np.arange(end - at)
            row["position"][at:end, 1:3] = tokens.place
            row["position"][at : end - 1, 3:] = tokens.place[1:]
            row["document"][at:end] = number
        at = end
    return row
