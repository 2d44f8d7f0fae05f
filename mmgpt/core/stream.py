"""What a step computes on: typed streams, the visibility rule, and the batch that holds both.

Shapes: B rows, T query positions, S key positions, F features, A position axes.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

Array = Any
"""A numpy or JAX array: batches are numpy on the host and JAX arrays in a step."""

TEXT, IMAGE, VIDEO, ACTION = 0, 1, 2, 3
"""Values of `Stream.modality`."""
MODALITIES = ("text", "image", "video", "action")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Visibility:
    """Which keys each query sees, in O(T) numbers, all int32.

    Query q sees key k iff `start[q] <= index[k] < stop[q]` and (`island[k] == 0` or `island[k] == island[q]`).
    Query side `start, stop, island [B, T]`; key side `index, key_island [B, S]`. A key of island -1 (padding, an
    empty cache slot) is seen by nobody; a query with `stop <= start` sees nothing and its output is zero.
    """

    start: Array
    stop: Array
    island: Array
    index: Array
    key_island: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
    """One typed stream of tokens: `ids [B, T] int32` or `feats [B, T, F] float32`, and what goes with each position.

    `modality [B, T]` int32 (see MODALITIES); `position [B, T, 5]` int32: the number in the document, row
    and column in a picture ((0, 0) outside), and row and column of the next id;
    `target [B, T]` int32, the default next id; `weight [B, T]` float32, 0 where no loss is taken.
    `unit [B, T]` masking unit, `geometry [B, T, G]` boxes or time spans, `source [B, T]` index into another stream.
    """

    ids: Array = None
    feats: Array = None
    modality: Array = None
    position: Array = None
    target: Array = None
    weight: Array = None
    unit: Array = None
    geometry: Array = None
    source: Array = None
    kind: str = dataclasses.field(default="tokens", metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Streams by name, visibilities by name (`"tokens"`, `"text<-media"`, ...), `row_id [B]` int64, labels by name.

    `labels` are pair-level: one value a row (matched or not, class, source).
    """

    streams: dict[str, Stream]
    visibility: dict[str, Visibility]
    row_id: Array
    labels: dict[str, Array] = dataclasses.field(default_factory=dict)


def packed_causal(document: np.ndarray) -> Visibility:
    """Causal visibility inside each document of packed rows.

    `document [B, T]` int32: the document's number in its row, non-decreasing, or -1 on padding.
    """
    rows, length = document.shape
    index = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    first = np.ones((rows, length), bool)
    first[:, 1:] = document[:, 1:] != document[:, :-1]
    start = np.maximum.accumulate(np.where(first, index, 0), axis=1).astype(np.int32)
    padding = document < 0
    return Visibility(
        start=start,
        stop=np.where(padding, start, index + 1).astype(np.int32),
        island=np.zeros_like(start),
        index=np.ascontiguousarray(index),
        key_island=np.where(padding, -1, 0).astype(np.int32),
    )
