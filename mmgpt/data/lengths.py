"""Exact token counts under every layout, by the index alone: of documents, and of the parts of split ones."""

import dataclasses

import numpy as np

from mmgpt.core.document import KINDS, Image, Text, Video
from mmgpt.data.index import Index
from mmgpt.tokens.grammars.grammar import Grammar

CHUNK = 1 << 18
"""Documents measured at a time: a billion of them are never in memory but as the few bytes of `Lengths` each."""

_TEXT = KINDS.index(Text)
_MEDIA = (KINDS.index(Image), KINDS.index(Video))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths:
    """Token counts of every document: `full` and `no_text` int32 [N].

    `swappable` bool [N]: some text comes before some medium, so that a swap changes the order. `droppable` bool [N]:
    there is text to drop and a medium that remains. `overhead` tokens belong to a document itself.
    """

    full: np.ndarray
    no_text: np.ndarray
    swappable: np.ndarray
    droppable: np.ndarray
    overhead: int

    def __len__(self) -> int:
        return len(self.full)

    @classmethod
    def measure(cls, grammar: Grammar, index: Index) -> "Lengths":
        """Lengths of every document in an index."""
        count = len(index.offset) - 1
        full, no_text = np.empty(count, np.int32), np.empty(count, np.int32)
        swappable, droppable = np.empty(count, bool), np.empty(count, bool)
        for first in range(0, count, CHUNK):
            chunk = slice(first, min(first + CHUNK, count))
            offset = np.asarray(index.offset[first : chunk.stop + 1])
            segments = slice(int(offset[0]), int(offset[-1]))
            kind, offset = np.asarray(index.kind[segments]), offset - offset[0]
            lengths = np.asarray(grammar.segment_lengths(kind, np.asarray(index.shape[segments])), np.int64)
            text, media = kind == _TEXT, (kind == _MEDIA[0]) | (kind == _MEDIA[1])
            texts_before = np.concatenate(([0], np.cumsum(text)))
            in_document = texts_before[:-1] - np.repeat(texts_before[offset[:-1]], np.diff(offset))
            full[chunk] = grammar.overhead + _sums(lengths, offset)
            no_text[chunk] = grammar.overhead + _sums(np.where(text, 0, lengths), offset)
            swappable[chunk] = _sums(media & (in_document > 0), offset) > 0
            droppable[chunk] = (_sums(text, offset) > 0) & (_sums(media, offset) > 0)
        return cls(full=full, no_text=no_text, swappable=swappable, droppable=droppable, overhead=grammar.overhead)


def _sums(values: np.ndarray, offset: np.ndarray) -> np.ndarray:
    total = np.concatenate(([0], np.cumsum(values, dtype=np.int64)))
    return total[offset[1:]] - total[offset[:-1]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """Documents split between segments: those of `document[i]` (ascending) are `offset[i] : offset[i + 1]`.

    `length` int32: tokens of each part; `first`, `stop` int32: its segments in the document. `refused`: segments that
    are longer than a row alone and so in no part.
    """

    document: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    first: np.ndarray
    stop: np.ndarray
    refused: int

    def __len__(self) -> int:
        return len(self.document)

    @classmethod
    def of(cls, grammar: Grammar, index: Index, row_length: int, documents: np.ndarray) -> "Parts":
        """Splits some documents (ascending): each part takes segments in order while they fit a row.

        All documents are walked at once, a segment of each at a time.
        """
        owner, number, lengths = _segments_of(grammar, index, documents)
        room = row_length - grammar.overhead
        fits, starts = lengths <= room, np.zeros(len(owner), bool)
        used = np.full(len(documents), room + 1, np.int64)  # over-full: the next segment opens a part
        at = np.argsort(number, kind="stable")
        for step in np.split(at, np.flatnonzero(np.diff(number[at])) + 1) if len(at) else ():
            who, length = owner[step], lengths[step]
            opens = used[who] + length > room
            starts[step] = opens & fits[step]
            used[who] = np.where(opens, length, used[who] + length)  # after one that fits no row, the next opens a part
        kept = np.flatnonzero(fits)
        opening = kept[starts[kept]]
        part = np.cumsum(starts[kept]) - 1
        parts = len(opening)
        return cls(
            document=np.asarray(documents),
            offset=np.concatenate(([0], np.cumsum(np.bincount(owner[opening], minlength=len(documents))))),
            length=(grammar.overhead + np.bincount(part, lengths[kept], minlength=parts)).astype(np.int32),
            first=number[opening].astype(np.int32),
            stop=(number[opening] + np.bincount(part, minlength=parts)).astype(np.int32),
            refused=int((~fits).sum()),
        )


def document_lengths(grammar: Grammar, index: Index, documents: np.ndarray) -> np.ndarray:
    """Tokens of some documents in plain layout, int64 [N]."""
    owner, _, lengths = _segments_of(grammar, index, documents)
    return grammar.overhead + np.bincount(owner, lengths, len(documents)).astype(np.int64)


def document_parts(grammar: Grammar, index: Index, document: int, row_length: int) -> Parts:
    """The parts of one document."""
    return Parts.of(grammar, index, row_length, np.array([document]))


def _segments_of(grammar: Grammar, index: Index, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All segments of some documents: the place of the document in `documents`, the number in it, and the tokens."""
    offset = np.asarray(index.offset)
    begin = offset[documents]
    counts = offset[documents + 1] - begin
    owner = np.repeat(np.arange(len(documents)), counts)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    segment = np.repeat(begin, counts) + number
    lengths = grammar.segment_lengths(np.asarray(index.kind[segment]), np.asarray(index.shape[segment]))
    return owner, number, np.asarray(lengths, np.int64)
