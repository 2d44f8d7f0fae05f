"""Training rows by number: a packed plan's rows, read, laid out and assembled, in batches with their visibility.

Which rows there are is the plan's; this file reads them. The state of a loader is one integer, the next global row.
"""

import abc
import dataclasses
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mmgpt.core.config import Config
from mmgpt.core.document import Document, Image, Text, Video
from mmgpt.core.log import console
from mmgpt.core.stream import Batch
from mmgpt.data import mixture, pack
from mmgpt.data.lengths import CHUNK, Lengths, Parts, document_lengths, document_parts
from mmgpt.data.mixture import Change, Source
from mmgpt.data.reading import Cache, LoaderError, Rejects, read_ahead
from mmgpt.data.record import Dataset
from mmgpt.data.row import assemble, batch_of, stacked
from mmgpt.data.shuffle import is_held_out
from mmgpt.tokens.grammars.grammar import Grammar, Tokens
from mmgpt.tokens.text import TextTokenizer

__all__ = ["REJECTS", "LoaderError", "PackedRows", "Rows", "RowsConfig", "check_text"]

REJECTS = "rejects.jsonl"
PLANS = "plans"
"""What a loader keeps in its run's folder: samples that failed, and pack plans."""
LEAST = {
    "batch_rows": 1,
    "row_length": 2,
    "height": 1,
    "width": 1,
    "cache_bytes": 0,
    "threads": 0,
    "prefetch": 0,
    "workers": 0,
}
"""The least that a loader's numbers may be, those of any loader."""


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

    def grow(self, rows: int) -> None:
        """Makes them the first `rows` rows: the same as before, and more. Nothing is opened again."""
        ...

    def close(self) -> None: ...


class RowsConfig(Config, abc.ABC):
    """Config of a loader; `batch_rows` rows make a global batch."""

    batch_rows: int

    @abc.abstractmethod
    def build(self, grammar: Grammar | None, *, seed: int, rows: int, folder: Path | None) -> Rows:
        """The loader of the first `rows` rows; rejects and plans are kept in `folder`, or nowhere."""

    def check(self) -> None:
        """Raises LoaderError on a number out of range."""
        for name, value in vars(self).items():
            if name in LEAST and value < LEAST[name]:
                raise LoaderError(f"data.{name} is {value}; give {LEAST[name]} or more.")
            if name == "held_out" and not 0 <= value < 1:
                raise LoaderError(f"data.held_out is {value}; give a share of 0 to below 1.")
            if name == "max_rejected" and not 0 <= value <= 1:
                raise LoaderError(f"data.max_rejected is {value}; give a share of 0 to 1.")


class PackedRows:
    """Documents of tokenised datasets, laid out by a grammar and packed into rows of one length."""

    class Config(RowsConfig):
        sources: tuple[Source.Config, ...]
        row_length: int  # tokens
        changes: tuple[Change, ...] = ()  # other mixtures, from a step on
        held_out: float = 0.02  # share of each source's documents that is kept from training
        cache_bytes: int = 256 << 20  # encoded documents that are kept in memory, in each process that loads
        threads: int = 2
        prefetch: int = 8  # batches
        workers: int = 0  # processes that load; 0 loads in this one
        max_rejected: float = 0.1  # share of samples that may fail to load before the run ends

        def build(self, grammar: Grammar | None, *, seed: int, rows: int, folder: Path | None) -> "PackedRows":
            """The loader of the first `rows` rows. Raises MixtureError, LoaderError, DatasetError, PlanError."""
            if grammar is None:
                raise LoaderError("packed rows need a grammar to lay documents out; the model's config names it.")
            if not self.sources:
                raise LoaderError("packed rows need a source, found none. Name tokenised datasets in data.sources.")
            self.check()
            return PackedRows(self, grammar, seed=seed, rows=rows, folder=folder)

    def __init__(self, config: Config, grammar: Grammar, *, seed: int, rows: int, folder: Path | None) -> None:
        self.batch_rows, self._config, self._grammar = config.batch_rows, config, grammar
        self._seed, self._count, self._folder = seed, rows, folder
        self._datasets: dict[str, Dataset] = {}
        self._phases = [config.sources, *(change.sources for change in config.changes)]
        for phase in self._phases:
            for source in phase:
                self._open(source)
        self._check_names()
        rejects = Rejects(None if folder is None else folder / REJECTS, config.max_rejected)
        self._read = _Reader(self._datasets, grammar, config.row_length, Cache(config.cache_bytes), rejects)

    @functools.cached_property
    def plan(self) -> pack.Plan:
        """The pack plan: made, or mapped where this run has made it before."""
        config, folder = self._config, None
        if self._folder is not None:
            inputs = {
                "sources": [[dataclasses.asdict(source) for source in phase] for phase in self._phases],
                "changes": [change.step for change in config.changes],
                "data": {path: _fingerprint(dataset) for path, dataset in self._datasets.items()},
                "filters": {s.keep: _stamp(s.keep) for phase in self._phases for s in phase if s.keep},
                "grammar": [self._grammar.name, self._grammar.overhead, _layout(self._grammar)],
                "numbers": [self._seed, config.row_length, config.batch_rows, config.held_out, self._count],
            }
            folder = self._folder / PLANS / pack.digest(**inputs)
            if folder.exists():
                try:
                    return pack.load(folder)
                except pack.PlanError as e:  # it is the same when it is made again
                    console.print(f"{e} It is made again now.")
                    shutil.rmtree(folder)
        first, *later = self.mixtures()
        return pack.plan(
            first,
            seed=self._seed,
            row_length=config.row_length,
            rows=self._count,
            changes=[(c.step * self.batch_rows, phase) for c, phase in zip(config.changes, later, strict=True)],
            directory=folder,
        )

    def mixtures(self) -> list[list[Source]]:
        """The sources of the first mixture and of each change, measured; they are large and not kept."""
        lengths = {path: Lengths.measure(self._grammar, dataset.index) for path, dataset in self._datasets.items()}
        return [[self._source(source, lengths[source.path]) for source in phase] for phase in self._phases]

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self._name(source) for phase in self._phases for source in phase))

    def batches(self, start_row: int, shard: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """Batches with the stream "tokens" and the visibility "tokens", numpy; see `Rows.batches`."""
        arrays = read_ahead(
            _PlannedRows(self._read, self.plan, [source for phase in self._phases for source in phase]),
            rows=self._count,
            batch_rows=self.batch_rows,
            start_row=start_row,
            shard=shard,
            threads=self._config.threads,
            prefetch=self._config.prefetch,
            workers=self._config.workers,
        )
        return map(batch_of, arrays)

    def held_out_batches(self, name: str, count: int) -> list[Batch]:
        """Up to `count` batches of one source's held-out documents, always the same; the last is filled up."""
        configs = [s for phase in self._phases for s in phase if self._name(s) == name]
        if not configs:
            raise LoaderError(f"no source {name!r}; there is {', '.join(self.sources)}.")
        plan = self._held_out_plan(configs[0], count * self.batch_rows)
        read = _PlannedRows(self._read, plan, configs[:1])
        rows = [read(row) for row in range(min(len(plan), count * self.batch_rows))]
        empty = assemble([], self._config.row_length, self._grammar.pad) | {"row": np.asarray(-1, np.int64)}
        rows += [empty] * (-len(rows) % self.batch_rows)
        parts = [rows[i : i + self.batch_rows] for i in range(0, len(rows), self.batch_rows)]
        return [stacked(part) for part in parts]

    def summary(self) -> dict[str, Any]:
        """Fill, tokens and epochs by source, what was rejected by the plan and at load; plain values."""
        return self.plan.summary() | {"rejected_at_load": len(self._read.rejects)}

    def grow(self, rows: int) -> None:
        """See `Rows.grow`: the plan is made, or mapped, when it is asked for next."""
        self._count = rows
        self.__dict__.pop("plan", None)

    def close(self) -> None:
        """Lets go of what is kept in memory; the loader is not used again."""
        self._read.cache = Cache(0)

    def _open(self, config: Source.Config) -> None:
        config.check()
        if config.path in self._datasets:
            return
        dataset = Dataset(Path(config.path))
        _check_tokenised(dataset)
        check_text(dataset, self._grammar.text)
        self._datasets[config.path] = dataset

    def _name(self, config: Source.Config) -> str:
        return config.name or self._datasets[config.path].name

    def _check_names(self) -> None:
        """LoaderError where one name would stand for two data sets, or twice in one mixture."""
        paths: dict[str, str] = {}
        for phase in self._phases:
            names = [self._name(source) for source in phase]
            for name, source in zip(names, phase, strict=True):
                if paths.setdefault(name, source.path) != source.path or names.count(name) > 1:
                    raise LoaderError(
                        f"{paths[name]} and {source.path} are both named {name!r} in the mixture; give one source a "
                        "`name` of its own."
                    )

    def _source(self, config: Source.Config, lengths: Lengths) -> Source:
        dataset, row_length = self._datasets[config.path], self._config.row_length
        split = functools.partial(Parts.of, self._grammar, dataset.index, row_length)
        return Source(config, dataset.name, lengths, row_length, held_out=self._config.held_out, split=split)

    def _held_out_plan(self, config: Source.Config, rows: int) -> pack.Plan:
        """Rows of the first held-out documents: as many as `rows` need are measured, not all."""
        dataset, row_length = self._datasets[config.path], self._config.row_length
        numbers, parts, lengths, tokens = list[np.ndarray](), list[np.ndarray](), list[np.ndarray](), 0
        for first in range(0, len(dataset), CHUNK):
            part = np.arange(first, min(first + CHUNK, len(dataset)))
            part = part[is_held_out(dataset.name, part, self._config.held_out)]
            length = document_lengths(self._grammar, dataset.index, part)
            fits = (length <= row_length) & (length > self._grammar.overhead)
            numbers.append(part[fits])
            parts.append(np.zeros(np.count_nonzero(fits), np.int64))
            lengths.append(length[fits])
            if config.split:
                split = Parts.of(self._grammar, dataset.index, row_length, part[length > row_length])
                counts = np.diff(split.offset)
                numbers.append(np.repeat(split.document, counts))
                parts.append(1 + np.arange(len(split.length)) - np.repeat(split.offset[:-1], counts))
                lengths.append(split.length.astype(np.int64))
            tokens = sum(int(found.sum()) for found in lengths)
            if tokens > 2 * rows * row_length:
                break
        if not tokens:
            raise LoaderError(
                f"source {dataset.name} ({config.path}) has no held-out document that a row of {row_length} tokens "
                f"holds: it has {len(dataset)} documents and data.held_out is {self._config.held_out}. Raise "
                "data.held_out or data.row_length, allow `split`, or import more documents."
            )
        found = (np.concatenate(numbers), np.concatenate(parts), np.concatenate(lengths))
        return pack.plan_once(dataset.name, *found, row_length=row_length)


class _Reader:
    """Reads one document as a row holds it. It goes to worker processes, where each opens the data for itself."""

    def __init__(
        self, datasets: dict[str, Dataset], grammar: Grammar, row_length: int, cache: Cache, rejects: Rejects
    ) -> None:
        self.datasets, self.grammar, self.row_length = datasets, grammar, row_length
        self.cache, self.rejects = cache, rejects

    def tokens(self, source: Source.Config, document: int, flags: int, part: int, length: int) -> Tokens | int:
        """The encoded document, or its length as a gap if it fails."""
        dataset = self.datasets[source.path]
        try:
            tokens: Tokens = self.cache.get(
                (source.path, source.first_loss, document, flags, part),
                lambda: self._encoded(dataset, source, document, flags, part),
                lambda tokens: sum(array.nbytes for array in vars(tokens).values()),
            )
        except ValueError as e:  # RecordError and what a grammar raises for codes or segments it cannot lay out
            self.rejects.add(f"{dataset.name}:{document}", str(e), f"{source.path}, document {document}")
            return length
        if len(tokens.ids) != length:
            raise LoaderError(
                f"{source.path}, document {document}: the grammar encodes {len(tokens.ids)} tokens where its "
                f"segment_lengths gives {length}. The two must agree: mend the grammar, or write the dataset again."
            )
        self.rejects.passed()
        return tokens

    def _encoded(self, dataset: Dataset, source: Source.Config, document: int, flags: int, part: int) -> Tokens:
        found = mixture.apply_layout(dataset[document], flags, source)
        if not part:
            return self.grammar.encode(found)
        parts = document_parts(self.grammar, dataset.index, document, self.row_length)
        first, stop = int(parts.first[part - 1]), int(parts.stop[part - 1])
        tokens = self.grammar.encode(Document(key=found.key, segments=found.segments[first:stop], meta=found.meta))
        if stop < len(found.segments):
            tokens.weight[-1] = 0.0  # the document does not end here
        return tokens


@dataclasses.dataclass(frozen=True)
class _PlannedRows:
    """A plan's rows by number; `sources` are configs by their number in the plan."""

    read: _Reader
    plan: pack.Plan
    sources: list[Source.Config]

    def __call__(self, row: int) -> dict[str, np.ndarray]:
        draws = self.plan.row(row)
        columns = (draws.source, draws.document, draws.flags, draws.part, draws.length)
        found = zip(*(column.tolist() for column in columns), strict=True)
        documents = [self.read.tokens(self.sources[source], *rest) for source, *rest in found]
        return assemble(documents, self.plan.row_length, self.read.grammar.pad) | {"row": np.asarray(row, np.int64)}


def _fingerprint(dataset: Dataset) -> list[Any]:
    return [dataset.name, [shard["sha256"] for shard in dataset.manifest["shards"]]]


def _stamp(path: str) -> list[int]:
    try:
        found = Path(path).stat()
    except OSError as e:
        raise LoaderError(f"keep={path}: {e.strerror}. Name a .npy file of bool, one value a document.") from e
    return [found.st_size, found.st_mtime_ns]


def _layout(grammar: Grammar) -> list[int]:
    """What a grammar makes of a few segments: another layout is another plan."""
    kind = np.array([0, 1, 2], np.uint8)
    shape = np.array([[7, 0, 0, 0, 0], [1, 4, 6, 1, 20], [2, 4, 6, 1, 40]], np.int32)
    return np.asarray(grammar.segment_lengths(kind, shape)).tolist()


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
