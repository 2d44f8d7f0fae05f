"""One packed row: laid-out documents one after another, each predicting inside itself alone; and batches of rows."""

import functools
from collections.abc import Iterable, Sequence

import numpy as np

from mmgpt.core.errors import UserError
from mmgpt.core.stream import Batch, Stream, Visibility
from mmgpt.tokens.grammars.grammar import Tokens

_POSITION = np.dtype(
    {"names": ["number", "place", "next"], "formats": ["i4", "i8", "i8"], "offsets": [0, 4, 12], "itemsize": 20}
)
"""Five int32 as three numbers, a place being two: copying them is then six times as fast."""


class RowError(UserError, ValueError):
    """Documents that do not make a row."""


def assemble(documents: Iterable[Tokens | int], row_length: int, pad: int) -> dict[str, np.ndarray]:
    """One row of T = `row_length` tokens: `ids target modality first` int32 [T], `position` int32 [T, 5],
    `weight` float32 [T].

    `target[t]` is the next id of the same document and `weight[t]` that id's loss weight, 0 on a document's last
    token. `first` is where the document begins. `position` is the number in the document, then the row and column in
    the picture of the id and of the next id. An integer in place of a document leaves a gap of that many tokens. Gaps
    and the rest of the row are padding: id `pad`, weight 0, first -1.
    """
    row = {
        "ids": np.empty(row_length, np.int32),
        "target": np.empty(row_length, np.int32),
        "modality": np.empty(row_length, np.int32),
        "position": np.empty((row_length, 5), np.int32),
        "first": np.empty(row_length, np.int32),
        "weight": np.empty(row_length, np.float32),
    }
    blank = {"ids": pad, "target": pad, "modality": 0, "position": 0, "first": -1, "weight": 0}
    position = row["position"].view(_POSITION)[:, 0]
    at = 0
    for number, tokens in enumerate(documents):
        end = at + (tokens if isinstance(tokens, int) else len(tokens.ids))
        if end > row_length:
            raise RowError(
                f"document {number} ends at token {end} of a row of {row_length}: the plan's lengths are wrong."
            )
        if isinstance(tokens, int):
            for name, value in blank.items():
                row[name][at:end] = value
        elif end > at:
            last = end - 1
            row["ids"][at:end] = tokens.ids
            row["target"][at:last] = tokens.ids[1:]
            row["target"][last] = pad
            row["weight"][at:last] = tokens.weight[1:]
            row["weight"][last] = 0
            row["modality"][at:end] = tokens.modality
            place = tokens.place.view(np.int64)[:, 0]
            position["number"][at:end] = _count(row_length)[: end - at]
            position["place"][at:end] = place
            position["next"][at:last] = place[1:]
            position["next"][last] = 0
            row["first"][at:end] = at
        at = end
    for name, value in blank.items():
        row[name][at:] = value
    return row


@functools.lru_cache(maxsize=4)
def _count(length: int) -> np.ndarray:
    return np.arange(length, dtype=np.int32)


@functools.lru_cache(maxsize=4)
def _constants(rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The index of every key and the island of every query, which all batches of a shape share."""
    index = np.tile(_count(length), (rows, 1))
    island = np.zeros_like(index)
    for shared in (index, island):
        shared.flags.writeable = False
    return index, island


def batch_of(rows: dict[str, np.ndarray]) -> Batch:
    """Stacked rows `[B, ...]`, with their numbers `row`, as a batch of the stream and the visibility "tokens"."""
    first = rows["first"]
    index, island = _constants(*first.shape)
    padding = first < 0
    # Padding sees nothing: it begins, and ends, at itself.
    start, key_island = np.where(padding, index, first), -padding.astype(np.int32)
    stop = index + 1 + key_island
    seen = Visibility(start=start, stop=stop, island=island, index=index, key_island=key_island)
    names = ("ids", "target", "modality", "position", "weight")
    return Batch(
        streams={"tokens": Stream(kind="tokens", **{name: rows[name] for name in names})},
        visibility={"tokens": seen},
        row_id=rows["row"],
    )


def stacked(rows: Sequence[dict[str, np.ndarray]]) -> Batch:
    """Assembled rows as a batch; they are numbered from 0 unless each has its number `row`."""
    numbers = {"row": np.arange(len(rows), dtype=np.int64)}
    return batch_of(numbers | {name: np.stack([row[name] for row in rows]) for name in rows[0]})
