"""The pack plan, which documents go into which row, and the assembly of one row.

A plan is made a window of rows at a time. The window takes a little more documents than it has room for, and in each
round every row takes the longest waiting document that it still has room for, fullest rows last; what is left waits
for the next window. All of it is sorting and searching of integers: the same plan on every host, at millions of
documents a second. Windows start at fixed rows, so the first R rows are the same however many are asked for.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmgpt.core.errors import UserError
from mmgpt.core.log import write_json
from mmgpt.data import mixture
from mmgpt.data.mixture import Draws, Source
from mmgpt.data.shuffle import counter_hash, key

WINDOW_TOKENS = 1 << 22
WINDOW_ROWS = (16, 512)
"""Rows are planned together by so many tokens, within these bounds: more of them fill better and mix documents more."""
SURPLUS = 1 / 32
"""Tokens a window has to choose from beyond its room."""
MAX_AGE = 4
"""Windows that a document waits before it goes first."""

_FILES = ("source", "document", "epoch", "flags", "part", "length")
VERSION = 1
"""Of the algorithm: a plan is a pure function of its inputs and of this number."""


class PlanError(UserError, ValueError):
    """A plan that cannot be made, saved or loaded; the message says what was found and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """R packed rows: row r holds `draws[row_offset[r]:row_offset[r + 1]]`, in that order.

    `sources`: names by number in `draws.source`; a changed mixture adds its sources anew, so a name may occur twice.
    `rejected`: source -> reason -> documents that no row holds. `held_out`: source -> documents kept from training.
    `used`: source -> its tokens, documents and epochs in these rows. `directory`: where the arrays are mapped from.
    """

    row_length: int
    row_offset: np.ndarray
    draws: Draws
    sources: tuple[str, ...]
    rejected: dict[str, dict[str, int]]
    held_out: dict[str, int]
    used: dict[str, dict[str, int]]
    directory: Path | None = None

    def __reduce__(self) -> Any:
        """A plan on disk goes to another process as its folder."""
        return super().__reduce__() if self.directory is None else (load, (self.directory,))

    def __len__(self) -> int:
        return len(self.row_offset) - 1

    def row(self, row: int) -> Draws:
        """What one row holds."""
        return self.draws.take(slice(int(self.row_offset[row]), int(self.row_offset[row + 1])))

    def summary(self) -> dict[str, Any]:
        """Rows, fill, and by source the tokens, documents and last epoch; plain values."""
        fill = sum(source["tokens"] for source in self.used.values()) / max(1, len(self) * self.row_length)
        return {
            "rows": len(self),
            "fill": fill,
            "sources": self.used,
            "held_out": self.held_out,
            "rejected": self.rejected,
        }


# --- packing a window


def _assigned(lengths: np.ndarray, room: np.ndarray, row: np.ndarray) -> None:
    """Gives items to rows, a round at a time: writes the row of each item to `row`, -1 where none, and lowers `room`.

    In a round every row takes the longest item that it has room for, the row with most room first; rows that want the
    same item take those after it. While the items are still shorter than the rows' room that is dealing them out.
    """
    order = np.argsort(-lengths, kind="stable")
    waiting = -lengths[order]  # ascending: longest first
    open_rows = np.argsort(-room, kind="stable")
    while len(waiting):
        open_rows = open_rows[np.argsort(-room[open_rows], kind="stable")]
        rooms = -room[open_rows]
        open_rows = open_rows[: np.searchsorted(rooms, waiting[-1], "right")]
        if not len(open_rows):
            return
        large = np.searchsorted(waiting, rooms[0])  # for those items there is no room any more
        roomy = min(int(np.searchsorted(rooms, waiting[large], "right")), len(waiting) - large)
        if 2 * roomy >= len(open_rows):  # most rows have room for the longest: they take the next items as they come
            took, wanted = open_rows[:roomy], slice(large, large + roomy)
            stay = slice(large + roomy, None)
        else:
            count = np.arange(len(open_rows))
            wanted = np.maximum.accumulate(np.searchsorted(waiting, rooms[: len(open_rows)]) - count) + count
            wanted = wanted[: np.searchsorted(wanted, len(waiting))]
            took = open_rows[: len(wanted)]
            stay = np.ones(len(waiting), bool)
            stay[wanted] = False
        row[order[wanted]] = took
        room[took] += waiting[wanted]
        waiting, order = waiting[stay], order[stay]


def packed(lengths: np.ndarray, row_length: int, rows: int, first: np.ndarray | None = None) -> np.ndarray:
    """The row of each item in `rows` rows of `row_length`, -1 for what finds no room, int64 [N].

    Items where `first` is True are placed before the others. Raises PlanError for an item longer than a row.
    """
    if (longest := int(lengths.max(initial=0))) > row_length:
        raise PlanError(f"an item of {longest} tokens fits no row of {row_length}. Build the sources for this row.")
    row, room = np.full(len(lengths), -1, np.int64), np.full(rows, row_length, np.int64)
    lengths = lengths.astype(np.int64)
    groups = [np.arange(len(lengths))] if first is None else [np.flatnonzero(first), np.flatnonzero(~first)]
    for group in groups:
        part = np.full(len(group), -1, np.int64)
        _assigned(lengths[group], room, part)
        row[group] = part
    return row


def pack_all(lengths: np.ndarray, row_length: int) -> list[list[int]]:
    """All items in few rows, as lists of their numbers."""
    rows: list[list[int]] = []
    left = np.arange(len(lengths))
    while len(left):
        count = -(-int(lengths[left].sum()) // row_length)
        row = packed(lengths[left], row_length, count)
        rows += [left[row == i].tolist() for i in range(count) if (row == i).any()]
        left = left[row < 0]
    return rows


@dataclasses.dataclass(frozen=True)
class _Block:
    """Some rows in order: `draws` row by row, `counts` documents in each."""

    draws: Draws
    counts: np.ndarray


class _Pool:
    """Draws that wait for a row, in the order they were drawn, with the window in which each came."""

    def __init__(self) -> None:
        self.draws, self._born, self._window = Draws.join([]), np.zeros(0, np.int64), 0

    def tokens(self) -> int:
        return int(self.draws.length.sum(dtype=np.int64))

    def add(self, draws: Draws) -> None:
        self.draws = Draws.join([self.draws, draws])
        self._born = np.concatenate([self._born, np.full(len(draws), self._window)])

    def window(self, seed: int, row: int, rows: int, emit: int, row_length: int) -> _Block:
        """Packs `rows` rows, of which the first is number `row`, and takes `emit` of them out."""
        found = packed(self.draws.length, row_length, rows, self._window - self._born >= MAX_AGE)
        used = np.unique(found[found >= 0])
        order = np.argsort(counter_hash(key(seed, "rows"), row + used), kind="stable")
        place = np.full(rows + 1, rows, np.int64)  # the last stands for -1
        place[used[order]] = np.arange(len(used))
        rank = place[found]
        out = np.argsort(rank, kind="stable")[: int((rank < min(emit, len(used))).sum())]
        block = _Block(self.draws.take(out), np.bincount(rank[out], minlength=min(emit, len(used))))
        stay = np.ones(len(self.draws), bool)
        stay[out] = False
        self.draws, self._born, self._window = self.draws.take(stay), self._born[stay], self._window + 1
        return block


class _Stream:
    """A mixture's draws, taken by tokens, with the cursor of every source behind what was taken."""

    def __init__(self, sources: Sequence[Source], seed: int, cursors: dict[str, tuple[int, int]], number: int) -> None:
        self._chunks = mixture.merged(sources, seed, first=dict(cursors), number=number)
        self._ahead, self.cursors, self.ended = Draws.join([]), cursors, False
        self._sources, self._number = sources, number

    def take(self, tokens: int) -> Draws:
        """The next draws, of at least so many tokens unless the mixture ends."""
        parts, found = [self._ahead], int(self._ahead.length.sum(dtype=np.int64))
        while found < tokens and not self.ended:
            chunk = next(self._chunks, None)
            self.ended = chunk is None
            if chunk is not None:
                parts.append(chunk)
                found += int(chunk.length.sum(dtype=np.int64))
        ahead = Draws.join(parts)
        cut = int(np.searchsorted(np.cumsum(ahead.length, dtype=np.int64), tokens)) + 1 if tokens > 0 else 0
        taken, self._ahead = ahead.take(slice(0, cut)), ahead.take(slice(cut, None))
        for i, source in enumerate(self._sources):
            mine = np.flatnonzero(taken.source == self._number + i)
            if len(mine):  # inside a split document the cursor counts its parts; past its last there are none to skip
                at, part = int(taken.at[mine[-1]]), int(taken.part[mine[-1]])
                self.cursors[source.name] = (at, part) if part else (at + 1, 0)
        return taken


def _window_rows(sources: Sequence[Source], row_length: int) -> int:
    """Rows of a window: at most a quarter of an epoch, so that small data is not shuffled across many epochs."""
    least, most = WINDOW_ROWS
    epoch = sum(source.tokens for source in sources) // row_length
    return int(np.clip(min(WINDOW_TOKENS // row_length, epoch // 4), least, most))


def _blocks(phases: Sequence[tuple[int, Sequence[Source]]], seed: int, row_length: int, rows: int) -> Iterator[_Block]:
    pool, cursors, number = _Pool(), dict[str, tuple[int, int]](), 0
    stops = [*(start for start, _ in phases[1:]), rows]
    for (row, sources), stop in zip(phases, stops, strict=True):
        stream, size = _Stream(sources, seed, cursors, number), _window_rows(sources, row_length)
        wanted = int(size * row_length * (1 + SURPLUS)) + 1
        while row < stop:
            pool.add(stream.take(wanted - pool.tokens()))
            left = pool.tokens()
            if not left:
                raise PlanError(
                    f"the mixture ends after {row} rows of {row_length} tokens, {rows} are needed: every source has "
                    "reached its max_epochs. Raise it, or train fewer steps."
                )
            window = size if left >= wanted else min(size, -(-left // row_length))
            block = pool.window(seed, row, window, min(window, stop - row), row_length)
            yield block
            row += len(block.counts)
        number += len(sources)


# --- plans


class _About:
    """What a plan tells of its sources; what is used of each is counted as the plan is made."""

    def __init__(self, names: tuple[str, ...], sources: Sequence[Source] = ()) -> None:
        self.sources = names
        self.rejected = {source.name: source.rejected for source in sources if source.rejected}
        self.held_out = {source.name: source.held_out for source in sources}
        self.used = {name: {"tokens": 0, "documents": 0, "epochs": 0} for name in names}

    def add(self, draws: Draws) -> None:
        tokens = np.bincount(draws.source, draws.length, len(self.sources))
        documents = np.bincount(draws.source[draws.part <= 1], minlength=len(self.sources))
        for number in np.unique(draws.source).tolist():
            entry = self.used[self.sources[number]]
            entry["tokens"] += int(tokens[number])
            entry["documents"] += int(documents[number])
            entry["epochs"] = max(entry["epochs"], int(draws.epoch[draws.source == number].max()) + 1)


def plan(
    sources: Sequence[Source],
    *,
    seed: int,
    row_length: int,
    rows: int,
    changes: Sequence[tuple[int, Sequence[Source]]] = (),
    directory: Path | None = None,
) -> Plan:
    """The first `rows` rows of a mixture. The same row comes out whatever `rows` is.

    `changes`: (row, sources) in ascending order of row: from that row on, further documents come from the new mixture,
    every source going on from its own cursor; the rows before it stay as they are without the change. With `directory`
    the plan is written there as it is made, and is then memory-mapped: any length takes little memory.
    """
    phases = [(0, sources), *(change for change in changes if change[0] < rows)]
    starts = [start for start, _ in phases]
    if starts != sorted(set(starts)):
        raise PlanError(f"mixture changes start at rows {starts[1:]}; rows must ascend and be above 0.")
    if rows < 1:
        raise PlanError(f"a plan needs at least one row, found rows={rows}.")
    blocks = _blocks(phases, seed, row_length, rows)
    everything = [source for _, phase in phases for source in phase]
    about = _About(tuple(source.name for source in everything), everything)
    if directory is None:
        return _in_memory(blocks, row_length, about)
    return _on_disk(blocks, row_length, about, directory)


def plan_once(name: str, documents: np.ndarray, parts: np.ndarray, lengths: np.ndarray, *, row_length: int) -> Plan:
    """Some documents of one source once, or parts of them (see `Draws.part`), in plain layout: for held-out data."""
    rows = pack_all(lengths, row_length)
    items = np.array([item for row in rows for item in row], np.int64)
    zeros = np.zeros(len(items), np.int32)
    draws = Draws(
        source=zeros.astype(np.uint16),
        document=documents[items],
        epoch=zeros,
        flags=zeros.astype(np.uint8),
        part=parts[items].astype(np.uint16),
        length=lengths[items].astype(np.int32),
        at=items,
    )
    return _in_memory([_Block(draws, np.array([len(row) for row in rows], np.int64))], row_length, _About((name,)))


def _in_memory(blocks: Iterable[_Block], row_length: int, about: _About) -> Plan:
    made = list(blocks)
    for block in made:
        about.add(block.draws)
    return Plan(
        row_length=row_length,
        row_offset=np.concatenate(([0], np.cumsum(np.concatenate([block.counts for block in made])))),
        draws=Draws.join([block.draws for block in made]),
        **vars(about),
    )


def _on_disk(blocks: Iterable[_Block], row_length: int, about: _About, directory: Path) -> Plan:
    """Writes the plan as a new folder of arrays, which appears whole or not at all, and maps it."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    rows = documents = 0
    try:
        with contextlib.ExitStack() as stack:
            files = {n: stack.enter_context(open(temporary / f"{n}.bin", "wb")) for n in ("row_offset", *_FILES)}
            files["row_offset"].write(np.zeros(1, np.int64).tobytes())
            for block in blocks:
                files["row_offset"].write((documents + np.cumsum(block.counts)).tobytes())
                for name in _FILES:
                    files[name].write(getattr(block.draws, name).tobytes())
                about.add(block.draws)
                rows, documents = rows + len(block.counts), documents + len(block.draws)
        meta = {"version": VERSION, "row_length": row_length, "rows": rows, "documents": documents, **vars(about)}
        write_json(temporary / "plan.json", meta)
        try:
            os.rename(temporary, directory)
        except OSError:
            if not (directory / "plan.json").is_file():  # else another process was first, with the same plan
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return load(directory)


def load(directory: Path) -> Plan:
    """A plan that was written to a folder, its arrays memory-mapped."""
    try:
        meta = json.loads((directory / "plan.json").read_text())
        rows, documents = int(meta["rows"]), int(meta["documents"])
        types = {name: getattr(Draws.join([]), name).dtype for name in _FILES}
        arrays = {name: _mapped(directory / f"{name}.bin", types[name], documents) for name in _FILES}
        return Plan(
            row_length=meta["row_length"],
            row_offset=_mapped(directory / "row_offset.bin", np.dtype(np.int64), rows + 1),
            draws=Draws(**arrays, at=np.broadcast_to(np.int64(-1), (documents,))),
            sources=tuple(meta["sources"]),
            rejected=meta["rejected"],
            held_out=meta["held_out"],
            used=meta["used"],
            directory=directory,
        )
    except (OSError, KeyError, ValueError) as e:
        raise PlanError(f"{directory}: not a whole plan ({e}).") from e


def _mapped(path: Path, dtype: np.dtype, size: int) -> np.ndarray:
    if path.stat().st_size != size * dtype.itemsize:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, expected {size * dtype.itemsize}")
    return np.memmap(path, dtype, "r", shape=(size,)) if size else np.zeros(0, dtype)


def digest(**parts: Any) -> str:
    """A short name for a plan's inputs (JSON values)."""
    return hashlib.sha256(json.dumps(parts | {"version": VERSION}, sort_keys=True).encode()).hexdigest()[:16]
