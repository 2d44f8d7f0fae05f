"""A small mixture with everything that can go wrong in it, and a trainer that loads it, for tests of loading.

As a program (`python -m tests.data.loading FOLDER WORKERS`) it prints the pids of its workers and loads for ever.
"""

import functools
import multiprocessing
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mmgpt.core.document import Document, Image, Text
from mmgpt.core.stream import Batch
from mmgpt.data.loader import PackedRows
from mmgpt.data.mixture import Change, Source
from mmgpt.data.record import Writer
from mmgpt.tokens.grammars.emu3 import Emu3
from tests import tiny

ROW, BATCH, BOOKS = 256, 8, (512,)
BAD = range(7, 10_000, 100)
"""One document in a hundred, whose code is outside the codebook."""


@functools.cache
def grammar() -> Emu3:
    return tiny.grammar(BOOKS)


def documents(count: int, seed: int, *, bad: bool = True) -> list[Document]:
    """Captions with a picture of 4 x 5 codes, and every third a text alone; the first ids of each name it."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        codes = rng.integers(0, 512, (4, 5, 1)).astype(np.int32)
        if bad and i in BAD:
            codes[2, 3] = 900
        words = np.array([30 + i % 200, 30 + i // 200, *rng.integers(30, 250, rng.integers(3, 60))], np.int32)
        image = [] if i % 3 == 2 and not (bad and i in BAD) else [Image(codes=codes)]
        found.append(Document(key=f"{seed}-{i}", segments=(Text(ids=words), *image)))
    return found


def write(folder: Path, name: str, found: list[Document]) -> str:
    with Writer(folder / name, name=name, shard_documents=150) as writer:
        for document in found:
            writer.write(document)
    return str(folder / name)


def mixture(folder: Path, *, bad: bool = True) -> PackedRows.Config:
    """Two sources with a filter, splitting, held-out documents, rejects and a change in mid-run."""
    one, two = (write(folder, name, documents(n, s, bad=bad)) for name, n, s in (("one", 600, 1), ("two", 400, 2)))
    keep = folder / "keep.npy"
    np.save(keep, np.arange(600) % 5 > 0)
    sources = (Source.Config(path=one, keep=str(keep), swap=0.3), Source.Config(path=two, weight=0.7, max_tokens=90))
    heavier = (sources[0], sources[1].replace(weight=2.0))
    return PackedRows.Config(
        sources=sources,
        changes=(Change(step=20, sources=heavier),),
        row_length=ROW,
        batch_rows=BATCH,
        held_out=0.05,
    )


def build(config: PackedRows.Config, steps: int = 40, folder: Path | None = None) -> PackedRows:
    return config.build(grammar(), seed=0, rows=steps * BATCH, folder=folder)


def present(batch: Batch) -> list[tuple[int, int]]:
    """The documents of a batch, each as the two ids that name it."""
    stream, found = batch.streams["tokens"], []
    for ids, number in zip(stream.ids, stream.position[..., 0], strict=True):
        for first in np.flatnonzero((ids == grammar().bos) & (number == 0)):
            text = ids[first + 1 :]
            if text[0] == grammar().boi:
                text = text[np.flatnonzero(text == grammar().eoi)[0] + 1 :]
            found.append((int(text[0]), int(text[1])))
    return found


def started(batches: Iterator[Batch], workers: int) -> list[int]:
    """The pids of all workers: they start one by one, as batches are asked for."""
    while len(found := multiprocessing.active_children()) < workers:
        next(batches)
    return [child.pid for child in found if child.pid is not None]


if __name__ == "__main__":
    config = mixture(Path(sys.argv[1])).replace(workers=int(sys.argv[2]))
    batches = build(config, 10**4, Path(sys.argv[1]) / "run").batches(0)
    print(*started(batches, config.workers), flush=True)
    while True:
        next(batches)
        time.sleep(0.01)
