"""Which documents come next and in which layout: pure functions of (seed, source, epoch, document).

A source is permuted anew in every epoch. Sources are merged by virtual time, tokens drawn so far divided by
weight: the source that is furthest behind its share comes next, so token shares follow the weights to within one
document (start-time fair queueing, Goyal et al. 1996).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from mmgpt.core import config
from mmgpt.core.document import Document, Image, Segment, Text, Video
from mmgpt.core.errors import UserError
from mmgpt.data.lengths import Lengths, Parts
from mmgpt.data.shuffle import is_held_out, key, permuted, uniform

DROP, SWAP = 1, 2
"""Bits of a document's layout flags: all text is dropped; media come before text."""

CHUNK_TOKENS = 1 << 22
CHUNK_DOCUMENTS = 1 << 16
"""What is merged and drawn at a time: bounds memory, never changes the order."""


class MixtureError(UserError, ValueError):
    """A mixture that cannot be drawn from; the message says which source, what was found and what to do."""


class Source:
    """The documents of one dataset that a mixture draws from, with their lengths."""

    class Config(config.Config):
        """One dataset in a mixture: its share, its layout draws, and which of its documents count."""

        path: str
        name: str = ""  # of the source; by default the dataset's, which two resolutions of it share
        weight: float = 1.0  # share of tokens, relative to the other sources
        swap: float = 0.0  # probability that media come before text
        drop_text: float = 0.0  # probability that all text is dropped, for guidance
        first_loss: float = 1.0  # loss multiplier on what comes first: text before media, media moved before text
        split: bool = False  # documents longer than a row are split between segments; otherwise they are left out
        min_tokens: int = 0  # shorter documents are left out
        max_tokens: int | None = None  # longer documents are left out
        max_documents: int | None = None  # only so many documents, always the same
        max_epochs: int | None = None  # the source leaves the mixture after so many epochs
        keep: str = ""  # file of a filter: .npy, bool, one value a document

        def check(self) -> None:
            """Raises MixtureError on a number out of range."""
            if not 0 < self.weight < math.inf:
                raise MixtureError(f"source {self.path}: weight is {self.weight}; give one above 0, or drop it.")
            for field in ("swap", "drop_text"):
                if not 0 <= getattr(self, field) <= 1:
                    raise MixtureError(f"source {self.path}: {field} is {getattr(self, field)}, expected 0 to 1.")
            if not 0 <= self.first_loss < math.inf:
                raise MixtureError(f"source {self.path}: first_loss is {self.first_loss}; give a number of 0 or more.")
            for field in ("max_documents", "max_epochs"):
                if (most := getattr(self, field)) is not None and most < 1:
                    raise MixtureError(f"source {self.path}: {field} is {most}; give 1 or more, or drop the source.")
            if self.max_tokens is not None and self.max_tokens < max(1, self.min_tokens):
                raise MixtureError(
                    f"source {self.path}: max_tokens is {self.max_tokens} and min_tokens {self.min_tokens}; no "
                    "document has such a length."
                )

    def __init__(
        self,
        config: Config,
        name: str,
        lengths: Lengths,
        row_length: int,
        *,
        held_out: float = 0.0,
        split: Callable[[np.ndarray], Parts] | None = None,
    ) -> None:
        """`name` is the dataset's: by it a share of `held_out` documents is kept from training.

        `split` makes the parts of some documents, those longer than a row, where the source allows it. What no row
        holds is counted in `rejected`.
        """
        config.check()
        self.config, self.lengths, self.row_length = config, lengths, row_length
        self.name, self._dataset = config.name or name, name
        self._held_out = held_out
        self._parts = split(np.flatnonzero(lengths.full > row_length)) if config.split and split else None
        self._keep = _filter(config.keep, len(lengths)) if config.keep else None
        self.count = len(lengths) if config.max_documents is None else min(config.max_documents, len(lengths))
        self.rejected, self.documents, self.tokens, self.held_out = self._counted()
        if not self.documents:
            raise MixtureError(
                f"source {name} ({config.path}): no document fits a row of {row_length} tokens, found {len(lengths)} "
                f"documents, rejected {self.rejected or 'none'}. Raise row_length, loosen the filters, allow `split`, "
                "or import more documents."
            )

    def select(self, documents: np.ndarray) -> np.ndarray:
        """Which documents are drawn from, bool [N]."""
        return self._refused(documents) == 0

    def draws(self, seed: int, first: tuple[int, int] = (0, 0)) -> Iterator["Draws"]:
        """The documents of this source in order: for ever, or for `max_epochs`.

        They go on from the place `first`: (documents passed, of the next one the parts already drawn).
        """
        at, drawn = first
        while self.config.max_epochs is None or at < self.config.max_epochs * self.count:
            epoch, place = divmod(at, self.count)
            size = min(CHUNK_DOCUMENTS, self.count - place)
            documents = self._subset(
                permuted(key(seed, "order", self.name, epoch), self.count, place + np.arange(size))
            )
            chosen = np.flatnonzero(self.select(documents))
            draws = self._laid_out(documents[chosen], at + chosen, seed, epoch)
            yield draws.take((draws.at > at) | (draws.part > drawn)) if drawn else draws
            at, drawn = at + size, 0

    def flags(self, seed: int, epoch: int, documents: np.ndarray) -> np.ndarray:
        """Layout flags of documents in an epoch, uint8 [N]; a flag is set only where it changes the document."""
        flags = np.zeros(len(documents), np.uint8)
        if self.config.drop_text:
            drop = uniform(key(seed, "drop", self.name, epoch), documents) < self.config.drop_text
            flags[drop & self.lengths.droppable[documents]] = DROP
        if self.config.swap:
            swap = uniform(key(seed, "swap", self.name, epoch), documents) < self.config.swap
            flags[swap & self.lengths.swappable[documents] & (flags == 0)] = SWAP
        return flags

    def _laid_out(self, documents: np.ndarray, at: np.ndarray, seed: int, epoch: int) -> "Draws":
        full, flags = self.lengths.full[documents], self.flags(seed, epoch, documents)
        length, part = (
            np.where(flags & DROP, self.lengths.no_text[documents], full),
            np.zeros(len(documents), np.uint16),
        )
        if self._parts is not None and (long := full > self.row_length).any():
            whole = np.searchsorted(self._parts.document, documents)
            begin = np.where(long, self._parts.offset[np.minimum(whole, len(self._parts) - 1)], 0)
            counts = np.ones(len(documents), np.int64)
            counts[long] = np.diff(self._parts.offset)[whole[long]]
            owner = np.repeat(np.arange(len(documents)), counts)
            number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
            split = long[owner]
            length = length[owner]
            length[split] = self._parts.length[(begin[owner] + number)[split]]
            part = np.where(split, number + 1, 0).astype(np.uint16)
            documents, at, flags = documents[owner], at[owner], np.where(split, 0, flags[owner]).astype(np.uint8)
        return Draws(
            source=np.zeros(len(documents), np.uint16),
            document=documents,
            epoch=np.full(len(documents), epoch, np.int32),
            flags=flags,
            part=part,
            length=length.astype(np.int32),
            at=at,
        )

    def _subset(self, documents: np.ndarray) -> np.ndarray:
        """Numbers below `count` as documents: with `max_documents` always the same ones, whatever the seed."""
        everything = len(self.lengths)
        return documents if self.count == everything else permuted(key("subset", self._dataset), everything, documents)

    def _everything(self) -> Iterator[np.ndarray]:
        for first in range(0, self.count, CHUNK_DOCUMENTS):
            yield np.sort(self._subset(np.arange(first, min(first + CHUNK_DOCUMENTS, self.count))))

    def _refused(self, documents: np.ndarray) -> np.ndarray:
        """Why a document is not drawn from, uint8: 0 it is, 1 held out, then `_REASONS`."""
        full, config = self.lengths.full[documents], self.config
        refused = np.zeros(len(documents), np.uint8)
        if self._keep is not None:
            refused[~self._keep[documents]] = 6
        refused[full < config.min_tokens] = 5
        if config.max_tokens is not None:
            refused[full > config.max_tokens] = 4
        refused[full <= self.lengths.overhead] = 3
        long = full > self.row_length
        if self._parts is None:
            refused[long] = 2
        elif long.any():
            place = np.searchsorted(self._parts.document, documents[long])
            refused[np.flatnonzero(long)[np.diff(self._parts.offset)[place] == 0]] = 2
        if self._held_out:
            refused[is_held_out(self._dataset, documents, self._held_out)] = 1
        return refused

    def _counted(self) -> tuple[dict[str, int], int, int, int]:
        """Rejected documents by reason, how many documents and tokens an epoch has, and documents held out."""
        counts, tokens = np.zeros(7, np.int64), 0
        for documents in self._everything():
            refused = self._refused(documents)
            counts += np.bincount(refused, minlength=7)
            tokens += int(self.lengths.full[documents[refused == 0]].sum(dtype=np.int64))
        reasons = (
            f"longer than {self.row_length} tokens",
            "empty",
            f"longer than max_tokens {self.config.max_tokens}",
            f"shorter than min_tokens {self.config.min_tokens}",
            "filtered by keep",
        )
        rejected = {reason: int(n) for reason, n in zip(reasons, counts[2:], strict=True) if n}
        if self._parts is not None and self._parts.refused:
            rejected[f"segments longer than {self.row_length} tokens"] = self._parts.refused
        return rejected, int(counts[0]), tokens, int(counts[1])


def _filter(path: str, documents: int) -> np.ndarray:
    try:
        keep = np.load(Path(path), mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise MixtureError(f"keep={path}: cannot be read ({e}). Give a .npy file of bool, one value a document.") from e
    if keep.shape != (documents,) or keep.dtype != bool:
        raise MixtureError(
            f"keep={path}: expected bool [{documents}], one value a document, found {keep.dtype} {list(keep.shape)}."
        )
    return keep


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draws:
    """Documents in order: `source` uint16, `document` int64, `epoch` int32, `flags` uint8, `length` int32 tokens.

    `part` uint16 is 0 for a whole document, k for the k-th part of one that is split; `at` int64 counts the documents
    that its source passed before.
    """

    source: np.ndarray
    document: np.ndarray
    epoch: np.ndarray
    flags: np.ndarray
    part: np.ndarray
    length: np.ndarray
    at: np.ndarray

    def __len__(self) -> int:
        return len(self.document)

    def take(self, which: np.ndarray | slice) -> "Draws":
        """The draws at some places, in that order."""
        return Draws(**{f.name: getattr(self, f.name)[which] for f in dataclasses.fields(self)})

    @staticmethod
    def join(parts: Sequence["Draws"]) -> "Draws":
        """Draws one after another."""
        types = {"source": np.uint16, "document": np.int64, "epoch": np.int32, "flags": np.uint8, "part": np.uint16}
        types |= {"length": np.int32, "at": np.int64}
        return Draws(**{n: np.concatenate([np.zeros(0, t), *(getattr(p, n) for p in parts)]) for n, t in types.items()})


class _Lane:
    """One source's draws with the virtual time at which each is due."""

    def __init__(self, source: Source, number: int, seed: int, first: tuple[int, int]) -> None:
        self._draws, self._number, self._weight = source.draws(seed, first), number, source.config.weight
        self._pending: list[tuple[np.ndarray, Draws]] = []
        self._tokens, self.ended = 0, False

    def until(self, horizon: float) -> list[tuple[np.ndarray, Draws]]:
        """Draws that are due before `horizon`, each part with its due times, float64."""
        while not self.ended and self._tokens / self._weight < horizon:
            draws = next(self._draws, None)
            if draws is None:
                self.ended = True
                break
            tokens = self._tokens + np.concatenate(([0], np.cumsum(draws.length, dtype=np.int64)))
            numbered = dataclasses.replace(draws, source=np.full(len(draws), self._number, np.uint16))
            self._pending.append((tokens[:-1] / self._weight, numbered))
            self._tokens = int(tokens[-1])
        due, ready = self._pending, []
        self._pending = []
        for time, draws in due:
            cut = int(np.searchsorted(time, horizon, side="left"))
            if cut:
                ready.append((time[:cut], draws.take(slice(0, cut))))
            if cut < len(draws):
                self._pending.append((time[cut:], draws.take(slice(cut, None))))
        return ready

    @property
    def empty(self) -> bool:
        return self.ended and not self._pending


def merged(
    sources: Sequence[Source], seed: int, *, first: Mapping[str, tuple[int, int]] | None = None, number: int = 0
) -> Iterator[Draws]:
    """All sources' draws merged by their weights, in chunks, until every source has ended.

    `first` is where each source goes on (its cursor, see `Source.draws`), `number` what the first source is called in
    `Draws.source`.
    """
    if not sources:
        raise MixtureError("a mixture needs at least one source, found none. Name one in `sources`.")
    total = sum(source.config.weight for source in sources)
    chunk = min(CHUNK_TOKENS, sum(source.tokens for source in sources))  # of small data no epochs that nobody asks for
    lanes = [_Lane(s, number + i, seed, (first or {}).get(s.name, (0, 0))) for i, s in enumerate(sources)]
    horizon = 0.0
    while not all(lane.empty for lane in lanes):
        horizon += chunk / total
        parts = [part for lane in lanes for part in lane.until(horizon)]
        if parts:
            time, draws = np.concatenate([t for t, _ in parts]), Draws.join([d for _, d in parts])
            yield draws.take(np.lexsort((draws.source, time)))


def apply_layout(document: Document, flags: int, source: Source.Config) -> Document:
    """The document as a row holds it: text dropped (DROP), or media moved before text (SWAP).

    What comes first there, and the rest should be predicted from, takes the source's `first_loss`.
    """
    if not flags and source.first_loss == 1.0:
        return document
    segments = document.segments
    media = [isinstance(segment, (Image, Video)) for segment in segments]
    opening = media.index(True) if True in media else 0  # segments of text before the first medium

    def first(segment: Segment) -> Segment:
        return dataclasses.replace(segment, loss=segment.loss * source.first_loss)

    if flags & DROP:
        # The text is unknown, not absent: no loss says that the document ends here.
        unknown = Text(ids=np.zeros(0, np.int32), loss=0.0)
        segments = (*(s for s in segments if not isinstance(s, Text)), unknown)
    elif flags & SWAP:
        front, back, moved = list[Segment](), list[Segment](), False
        for segment, medium in zip(segments, media, strict=True):
            moved = moved or isinstance(segment, Text)
            if medium:
                front.append(first(segment) if moved else segment)
            else:
                back.append(segment)
        segments = tuple(front + back)
    elif source.first_loss != 1.0:
        segments = (*map(first, segments[:opening]), *segments[opening:])
    return dataclasses.replace(document, segments=segments)


class Change(config.Config):
    """From step `step` on, other sources or weights; a source that goes on, goes on where it was."""

    step: int
    sources: tuple[Source.Config, ...]
