"""From a pack plan to batches: random access by row, read ahead in threads, the same rows on any number of hosts.

The state of a loader is one integer, the next global row. A document that fails at load leaves a gap of weight 0 in
its row and a line in the rejects file; the plan and every other row stay as they are.
"""

import abc
import json
import logging
import threading
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any, Protocol

import grain
import numpy as np

from mmgpt.core.config import Config
from mmgpt.core.document import Image, Text, Video
from mmgpt.core.errors import UserError
from mmgpt.core.stream import Batch, Stream, packed_causal
from mmgpt.data import mixture, pack
from mmgpt.data.mixture import Change, Lengths, Source
from mmgpt.data.record import Dataset
from mmgpt.tokens.grammars.grammar import Grammar, Tokens
from mmgpt.tokens.text import TextTokenizer

log = logging.getLogger(__name__)

MAX_FAILED = 64
"""Samples that may fail one after another before the run ends: half-broken data passes, a wrong grammar does not."""


class LoaderError(UserError, ValueError):
    """A loader that cannot go on; the message says what was found and what to do."""


class Rows(Protocol):
    """Training rows by number: what the training loop and the evaluators see of a data set."""

    batch_rows: int

    @property
    def sources(self) -> tuple[str, ...]: ...

    def batches(self, start_row: int, shard: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """Global batches from `start_row` on; of each, part `shard[0]` of `shard[1]` equal parts, in row order."""
        ...

    def held_out_batches(self, name: str, count: int) -> list[Batch]: ...
    def summary(self) -> dict[str, Any]: ...
    def close(self) -> None: ...


class RowsConfig(Config, abc.ABC):
    """Config of a loader; `batch_rows` rows make a global batch."""

    batch_rows: int

    @abc.abstractmethod
    def build(self, grammar: Grammar | None, *, seed: int, rows: int, rejects: Path | None) -> Rows:
        """The loader of the first `rows` rows; what fails at load is listed in the file `rejects`."""


class Rejects:
    """Counts what failed at load and writes one {"key", "reason", "place"} line for each, once. Safe in threads.

    A bad sample never ends a run, but where nothing loads any more the data or the grammar is wrong.
    """

    def __init__(self, path: Path | None) -> None:
        self._path, self._seen, self._lock = path, set[str](), threading.Lock()
        self._in_a_row = 0

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, key: str, reason: str, place: str) -> None:
        """Notes one failure; `place` tells dataset and document. Raises LoaderError after MAX_FAILED in a row."""
        with self._lock:
            self._in_a_row += 1
            if self._in_a_row >= MAX_FAILED:
                raise LoaderError(f"{MAX_FAILED} samples in a row failed to load, the last: {place}: {reason}")
            if place in self._seen:
                return
            self._seen.add(place)
            log.warning("%s: left out, %s", place, reason)
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("a") as file:
                    file.write(json.dumps({"key": key, "reason": reason, "place": place}) + "\n")

    def passed(self) -> None:
        """Notes that a sample loaded."""
        self._in_a_row = 0


class Cache:
    """Keeps the first values that fit a byte budget: an epoch visits all alike, so none is worth evicting for."""

    def __init__(self, budget: int) -> None:
        self._values, self._room, self._lock = dict[Hashable, Any](), budget, threading.Lock()

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


class _ShareOrder:
    """Row numbers such that each host's strided share of a global batch is one run of its rows.

    Grain's elastic iterator gives host i the elements i, i + n, ... of a batch; element e here is the row that puts
    the hosts' parts, one after another, into row order.
    """

    def __init__(self, start: int, stop: int, batch_rows: int, hosts: int) -> None:
        self._start, self._batch, self._hosts = start, batch_rows, hosts
        self._length = start + (stop - start) // batch_rows * batch_rows

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> int:
        batch, place = divmod(index - self._start, self._batch)
        turn, host = divmod(place, self._hosts)
        return self._start + batch * self._batch + host * (self._batch // self._hosts) + turn


def read_ahead(
    load: Callable[[int], dict[str, np.ndarray]],
    *,
    rows: int,
    batch_rows: int,
    start_row: int,
    shard: tuple[int, int],
    threads: int,
    prefetch: int,
) -> Iterator[dict[str, np.ndarray]]:
    """Rows `start_row` to `rows` by `load`, stacked into this shard's part of each global batch of `batch_rows`.

    `threads` load up to `prefetch` batches ahead; what they raise is raised here. The last partial batch is dropped.
    """
    index, count = shard
    if not 0 <= index < count or batch_rows % count:
        raise LoaderError(f"shard {index} of {count} cannot take equal parts of {batch_rows} rows; change batch_rows.")
    if not 0 <= start_row <= rows:
        raise LoaderError(f"start row {start_row} is outside the plan's rows 0 to {rows}; ask for more rows.")
    order = _ShareOrder(start_row, rows, batch_rows, count)
    if len(order) == start_row:
        return
    elastic = grain.experimental.ElasticIterator(
        grain.MapDataset.source(order).map(load),
        batch_rows,
        grain.sharding.ShardOptions(shard_index=index, shard_count=count),
        read_options=grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch),
    )
    iterator = iter(elastic)
    iterator.set_state({"global_next_index": start_row})
    try:
        yield from iterator
    finally:
        iterator.close()


class PackedRows:
    """Documents of tokenised datasets, laid out by a grammar and packed into rows of one length."""

    class Config(RowsConfig):
        sources: tuple[Source.Config, ...]
        row_length: int  # tokens
        changes: tuple[Change, ...] = ()
        held_out: float = 0.02  # share of each source's documents that is kept from training
        cache_bytes: int = 256 << 20  # encoded documents that are kept in memory
        threads: int = 2
        prefetch: int = 8  # batches

        def build(self, grammar: Grammar | None, *, seed: int, rows: int, rejects: Path | None) -> "PackedRows":
            """The loader of the first `rows` rows. Raises MixtureError, LoaderError, DatasetError."""
            if grammar is None:
                raise LoaderError("packed rows need a grammar to lay documents out; the model's config names it.")
            if not self.sources:
                raise LoaderError("packed rows need a source, found none. Name tokenised datasets in data.sources.")
            return PackedRows(self, grammar, seed=seed, rows=rows, rejects=rejects)

    def __init__(self, config: Config, grammar: Grammar, *, seed: int, rows: int, rejects: Path | None) -> None:
        self.batch_rows, self._config, self._grammar = config.batch_rows, config, grammar
        self._rejects, self._cache = Rejects(rejects), Cache(config.cache_bytes)
        self._datasets: dict[str, Dataset] = {}
        self._lengths: dict[str, Lengths] = {}
        phases = [config.sources, *(change.sources for change in config.changes)]
        for source in (source for phase in phases for source in phase):
            self._open(source)
        first, *later = [[self._source(s, held_out=False) for s in phase] for phase in phases]
        self._sources = [source for phase in (first, *later) for source in phase]
        self._plan = pack.plan(
            first,
            seed=seed,
            row_length=config.row_length,
            rows=rows,
            changes=[(change.row, phase) for change, phase in zip(config.changes, later, strict=True)],
        )

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(source.name for source in self._sources))

    def batches(self, start_row: int, shard: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """Batches with the stream "tokens" and the visibility "tokens", numpy; see `Rows.batches`."""
        arrays = read_ahead(
            lambda row: self._row(self._plan, self._sources, row),
            rows=len(self._plan),
            batch_rows=self.batch_rows,
            start_row=start_row,
            shard=shard,
            threads=self._config.threads,
            prefetch=self._config.prefetch,
        )
        return map(_batch, arrays)

    def held_out_batches(self, name: str, count: int) -> list[Batch]:
        """Up to `count` batches of one source's held-out documents, always the same; the last is filled up."""
        configs = [source.config for source in self._sources if source.name == name]
        if not configs:
            raise LoaderError(f"no source {name!r}; there is {', '.join(self.sources)}.")
        source = self._source(configs[0], held_out=True)
        plan = pack.plan_once(source, row_length=self._config.row_length)
        rows = [self._row(plan, [source], row) for row in range(min(len(plan), count * self.batch_rows))]
        empty = pack.assemble([], self._config.row_length, self._grammar.pad) | {"row": np.int64(-1)}
        rows += [empty] * (-len(rows) % self.batch_rows)
        parts = [rows[i : i + self.batch_rows] for i in range(0, len(rows), self.batch_rows)]
        return [_batch({name: np.stack([row[name] for row in part]) for name in empty}) for part in parts]

    def summary(self) -> dict[str, Any]:
        """Fill, tokens and epochs by source, what was rejected by the plan and at load; plain values."""
        held_out = {d.name: int(self._held_out(d).sum()) for d in self._datasets.values()}
        return self._plan.summary() | {"held_out": held_out, "rejected_at_load": len(self._rejects)}

    def close(self) -> None:
        """Lets go of what is kept in memory; the loader is not used again."""
        self._cache = Cache(0)

    def _open(self, config: Source.Config) -> None:
        config.check()
        if config.path in self._datasets:
            return
        dataset = Dataset(Path(config.path))
        for path, other in self._datasets.items():
            if other.name == dataset.name:
                raise LoaderError(f"{path} and {config.path} are both named {dataset.name!r}; name one otherwise.")
        _check_tokenised(dataset)
        check_text(dataset, self._grammar.text)
        self._datasets[config.path] = dataset
        self._lengths[config.path] = Lengths.measure(self._grammar, dataset.index)

    def _held_out(self, dataset: Dataset) -> np.ndarray:
        return mixture.is_held_out(dataset.name, len(dataset), self._config.held_out)

    def _source(self, config: Source.Config, *, held_out: bool) -> Source:
        dataset = self._datasets[config.path]
        documents = np.flatnonzero(self._held_out(dataset) == held_out)
        if not len(documents):
            which = "held-out" if held_out else "training"
            raise LoaderError(
                f"source {dataset.name} ({config.path}) has no {which} document: it holds {len(dataset)} and "
                f"held_out is {self._config.held_out}. Change held_out or import more documents."
            )
        return Source(config, dataset.name, self._lengths[config.path], documents, self._config.row_length)

    def _row(self, plan: pack.Plan, sources: list[Source], row: int) -> dict[str, np.ndarray]:
        draws = plan.row(row)
        found = zip(
            draws.source.tolist(), draws.document.tolist(), draws.flags.tolist(), draws.length.tolist(), strict=True
        )
        documents = [self._tokens(sources[s].config, document, flags, length) for s, document, flags, length in found]
        return pack.assemble(documents, plan.row_length, self._grammar.pad) | {"row": np.asarray(row, np.int64)}

    def _tokens(self, source: Source.Config, document: int, flags: int, length: int) -> Tokens | int:
        """The encoded document, or its length as a gap if it fails."""
        dataset = self._datasets[source.path]
        try:
            tokens: Tokens = self._cache.get(
                (source, document, flags),
                lambda: self._grammar.encode(mixture.apply_layout(dataset[document], flags, source)),
                lambda tokens: sum(array.nbytes for array in vars(tokens).values()),
            )
        except ValueError as e:  # RecordError and what a grammar raises for codes or segments it cannot lay out
            self._rejects.add(f"{dataset.name}:{document}", str(e), f"{source.path}, document {document}")
            return length
        if len(tokens.ids) != length:
            raise LoaderError(
                f"{source.path}, document {document}: the grammar encodes {len(tokens.ids)} tokens where its "
                f"segment_lengths gives {length}. The two must agree: mend the grammar, or write the dataset again."
            )
        self._rejects.passed()
        return tokens


def _check_tokenised(dataset: Dataset) -> None:
    for segment in dataset[0].segments if len(dataset) else ():
        if (isinstance(segment, Text) and segment.ids is None) or (
            isinstance(segment, (Image, Video)) and segment.codes is None
        ):
            kind = type(segment).__name__.lower()
            raise LoaderError(
                f"{dataset.directory}: holds raw {kind}, expected ids and codes. Write them with `mmgpt tokenize`."
            )


def check_text(dataset: Dataset, text: TextTokenizer) -> None:
    """LoaderError where the manifest says that the ids are of another text tokenizer: they would be other words."""
    made = dataset.manifest["meta"].get("settings", {}).get("text_probe")
    if made is not None and made != text.fingerprint():
        raise LoaderError(
            f"{dataset.directory}: its text was tokenised with another tokenizer than the model's. Name that one in "
            "tokens.text, or write the dataset again with `mmgpt tokenize data --text` and the model's."
        )


def _batch(arrays: dict[str, np.ndarray]) -> Batch:
    stream = Stream(
        ids=arrays["ids"],
        target=arrays["target"],
        modality=arrays["modality"],
        position=arrays["position"],
        weight=arrays["weight"],
    )
    return Batch(
        streams={"tokens": stream}, visibility={"tokens": packed_causal(arrays["document"])}, row_id=arrays["row"]
    )
