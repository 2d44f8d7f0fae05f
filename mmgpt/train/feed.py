"""The batches of a run in their order: read ahead, without the rows that are left out."""

import itertools
from collections.abc import Iterator

import jax
import numpy as np

from mmgpt.core.stream import Batch
from mmgpt.data.loader import Rows
from mmgpt.train.skips import Skips
from mmgpt.train.step import place

Share = tuple[int, int]
"""This process's part of a global batch's rows: (which, of how many)."""


def feed(rows: Rows, skips: Skips, step: int, share: Share) -> Iterator[Batch]:
    """This process's parts of the global batches for the steps after `step`."""
    for first, stop in skips.kept(skips.row(step)):
        count = None if stop is None else (stop - first) // rows.batch_rows
        yield from itertools.islice(rows.batches(first, share), count)


def place_part(batch: Batch, share: Share) -> Batch:
    """A global batch that every process has in whole, on the devices."""
    return place(jax.tree.map(lambda leaf: np.split(leaf, share[1])[share[0]], batch), share[1])
