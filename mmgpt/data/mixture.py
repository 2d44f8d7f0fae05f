"""Which documents come next and in which layout: pure functions of (seed, source, epoch, document).

A source is permuted anew in every epoch. Sources are merged by virtual time, tokens drawn so far divided by
weight: the source that is furthest behind its share comes next, so token shares follow the weights to within one
document (start-time fair queueing, Goyal et al. 1996). All draws are hashes of counters, never a running generator,
so they are the same for every host, restart and NumPy version.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mmgpt.core import config
from mmgpt.core.document import KINDS, Document, Image, Segment, Text, Video
from mmgpt.core.errors import UserError
from mmgpt.data.index import Index
from mmgpt.tokens.grammars.grammar import Grammar

DROP, SWAP = 1, 2
"""Bits of a document's layout flags: all text is dropped; media come before text."""

CHUNK_TOKENS = 1 << 17
"""Tokens that are merged at a time: bounds memory, never changes the order."""

_TEXT = KINDS.index(Text)
_MEDIA = (KINDS.index(Image), KINDS.index(Video))


class MixtureError(UserError, ValueError):
    """A mixture that cannot be drawn from; the message says which source, what was found and what to do."""


def key(*parts: int | str) -> int:
    """A 64-bit key for a family of draws, e.g. `key(seed, "order", source, epoch)`."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def counter_hash(family: int, counter: np.ndarray) -> np.ndarray:
    """One 64-bit hash per counter: the splitmix64 stream that starts at `family` (Steele et al. 2014). uint64 [N]."""
    z = np.asarray(counter).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(family)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniform(family: int, counter: np.ndarray) -> np.ndarray:
    """One number in [0, 1) per counter, float64 [N]."""
    return (counter_hash(family, counter) >> np.uint64(11)) * 2.0**-53


def permutation(seed: int, name: str, epoch: int, documents: np.ndarray) -> np.ndarray:
    """`documents` in the order of one epoch, int64 [N]."""
    return documents[np.argsort(counter_hash(key(seed, "order", name, epoch), documents), kind="stable")]


def is_held_out(name: str, count: int, share: float) -> np.ndarray:
    """Which of a dataset's `count` documents are kept from training; the same for every seed. bool [count]."""
    return uniform(key("held out", name), np.arange(count)) < share


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths:
    """Exact token counts of every document under every layout: `full` and `no_text` int64 [N].

    `swappable [N]`: some text comes before some medium, so that SWAP changes the order. `droppable [N]`: there is
    text to drop and a medium that remains.
    """

    full: np.ndarray
    no_text: np.ndarray
    swappable: np.ndarray
    droppable: np.ndarray
    overhead: int

    @classmethod
    def measure(cls, grammar: Grammar, index: Index) -> "Lengths":
        """Lengths of every document in an index."""
        kind, offset = np.asarray(index.kind), np.asarray(index.offset)
        lengths = np.asarray(grammar.segment_lengths(kind, np.asarray(index.shape)), np.int64)
        text, media = kind == _TEXT, np.isin(kind, _MEDIA)
        texts_before = np.concatenate(([0], np.cumsum(text)))
        in_document = texts_before[:-1] - np.repeat(texts_before[offset[:-1]], np.diff(offset))
        return cls(
            full=grammar.overhead + _per_document(lengths, offset),
            no_text=grammar.overhead + _per_document(np.where(text, 0, lengths), offset),
            swappable=_per_document(media & (in_document > 0), offset) > 0,
            droppable=(_per_document(text, offset) > 0) & (_per_document(media, offset) > 0),
            overhead=grammar.overhead,
        )


def _per_document(values: np.ndarray, offset: np.ndarray) -> np.ndarray:
    total = np.concatenate(([0], np.cumsum(values, dtype=np.int64)))
    return total[offset[1:]] - total[offset[:-1]]


class Source:
    """One dataset in a mixture: its documents, their lengths, its share of tokens and its layout draws."""

    class Config(config.Config):
        path: str
        weight: float = 1.0  # share of tokens, relative to the other sources
        swap: float = 0.0  # probability that media come before text
        drop_text: float = 0.0  # probability that all text is dropped, for guidance
        first_loss: float = 1.0  # loss multiplier on what comes first: text before media, media moved before text

        def check(self) -> None:
            """Raises MixtureError on a weight or probability out of range."""
            if not self.weight > 0:
                raise MixtureError(
                    f"source {self.path}: weight is {self.weight}; it must be above 0, or drop the source."
                )
            for field in ("swap", "drop_text"):
                if not 0 <= getattr(self, field) <= 1:
                    raise MixtureError(f"source {self.path}: {field} is {getattr(self, field)}, expected 0 to 1.")
            if not 0 <= self.first_loss < float("inf"):
                raise MixtureError(f"source {self.path}: first_loss is {self.first_loss}; give a number of 0 or more.")

    def __init__(self, config: Config, name: str, lengths: Lengths, documents: np.ndarray, row_length: int) -> None:
        """`documents` int64: the numbers to draw from; those that no row of `row_length` can hold are rejected."""
        config.check()
        full = lengths.full[documents]
        too_long, empty = full > row_length, full <= lengths.overhead
        self.config, self.name, self.lengths = config, name, lengths
        self.documents = documents[~too_long & ~empty]
        counts = {f"longer than {row_length} tokens": int(too_long.sum()), "empty": int(empty.sum())}
        self.rejected = {reason: count for reason, count in counts.items() if count}
        if not len(self.documents):
            raise MixtureError(
                f"source {name} ({config.path}): no document fits a row of {row_length} tokens, found {len(documents)} "
                f"documents, rejected {self.rejected or 'none'}. Raise row_length or import more documents."
            )

    def flags(self, seed: int, epoch: int, documents: np.ndarray) -> np.ndarray:
        """Layout flags of documents in an epoch, uint8 [N]; a flag is set only where it changes the document."""
        drop = uniform(key(seed, "drop", self.name, epoch), documents) < self.config.drop_text
        swap = uniform(key(seed, "swap", self.name, epoch), documents) < self.config.swap
        drop &= self.lengths.droppable[documents]
        swap &= self.lengths.swappable[documents] & ~drop
        return (drop * DROP + swap * SWAP).astype(np.uint8)

    def draws(self, seed: int, first: int) -> Iterator["Draws"]:
        """The documents of this source for ever, an epoch at a time, from its `first`-th draw on."""
        epoch, skip = divmod(first, len(self.documents))
        while True:
            documents = permutation(seed, self.name, epoch, self.documents)[skip:]
            flags = self.flags(seed, epoch, documents)
            dropped = (flags & DROP) > 0
            yield Draws(
                source=np.zeros(len(documents), np.uint16),
                document=documents,
                epoch=np.full(len(documents), epoch, np.int32),
                flags=flags,
                length=np.where(dropped, self.lengths.no_text[documents], self.lengths.full[documents]).astype(
                    np.int32
                ),
            )
            epoch, skip = epoch + 1, 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draws:
    """Documents in order: `source` uint16, `document` int64, `epoch` int32, `flags` uint8, `length` int32 tokens."""

    source: np.ndarray
    document: np.ndarray
    epoch: np.ndarray
    flags: np.ndarray
    length: np.ndarray

    def __len__(self) -> int:
        return len(self.document)

    def take(self, which: np.ndarray | slice) -> "Draws":
        """The draws at some places, in that order."""
        return Draws(**{f.name: getattr(self, f.name)[which] for f in dataclasses.fields(self)})

    @staticmethod
    def join(parts: Sequence["Draws"]) -> "Draws":
        """Draws one after another; at least one part."""
        return Draws(**{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Draws)})


class _Lane:
    """One source's draws with the virtual time at which each is due."""

    def __init__(self, source: Source, number: int, seed: int, first: int) -> None:
        self._draws, self._number, self._weight = source.draws(seed, first), number, source.config.weight
        self._pending: list[tuple[np.ndarray, Draws]] = []
        self._tokens = 0

    def until(self, horizon: float) -> list[tuple[np.ndarray, Draws]]:
        """Draws that are due before `horizon`, each part with its due times, float64."""
        while self._tokens / self._weight < horizon:
            draws = next(self._draws)
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


def merged(
    sources: Sequence[Source], seed: int, *, first: Mapping[str, int] | None = None, number: int = 0
) -> Iterator[Draws]:
    """All sources' draws merged by their weights, in chunks, for ever.

    `first` is the number of draws already taken from each source (its cursor), `number` what the first source is
    called in `Draws.source`.
    """
    if not sources:
        raise MixtureError("a mixture needs at least one source, found none. Name one in `sources`.")
    total = sum(source.config.weight for source in sources)
    lanes = [_Lane(s, number + i, seed, (first or {}).get(s.name, 0)) for i, s in enumerate(sources)]
    horizon = 0.0
    while True:
        horizon += CHUNK_TOKENS / total
        parts = [part for lane in lanes for part in lane.until(horizon)]
        if parts:
            time, draws = np.concatenate([t for t, _ in parts]), Draws.join([d for _, d in parts])
            yield draws.take(np.lexsort((draws.source, time)))


def apply_layout(document: Document, flags: int, source: Source.Config) -> Document:
    """The document as a row holds it: text dropped (DROP), or media moved before text (SWAP).

    What comes first there, and the rest should be predicted from, takes the source's `first_loss`.
    """
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
    else:
        segments = (*map(first, segments[:opening]), *segments[opening:])
    return dataclasses.replace(document, segments=segments)


class Change(config.Config):
    """From global row `row` on, other sources or weights; a source that goes on, goes on where it was."""

    row: int
    sources: tuple[Source.Config, ...]
