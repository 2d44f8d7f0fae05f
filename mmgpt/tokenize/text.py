"""Training a text tokenizer on the text of raw datasets."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mmgpt.core.document import Text
from mmgpt.core.log import check_writable, console, progress, write_atomic
from mmgpt.data.codec import RecordError
from mmgpt.data.record import Dataset
from mmgpt.tokens.text import TextError, TextTokenizer


def train_text(
    datasets: list[Path], out: Path, size: int, most: int, superwords: bool, overwrite: bool = False
) -> TextTokenizer:
    """Trains on at most `most` documents, spread evenly over all datasets, and writes the model to `out`."""
    if most < 1:
        raise TextError(f"--most is {most}; give the texts to train on at most, 1 or more.")
    if out.exists() and not overwrite:
        raise TextError(
            f"{out} is there, and datasets may be tokenised with it. Give another --out, or --overwrite True."
        )
    check_writable(out)
    opened = [Dataset(path) for path in datasets]
    documents = sum(len(d) for d in opened)
    if documents == 0:
        raise TextError("no documents to train a text tokenizer on; import some first.")
    share = min(1.0, most / documents)
    damaged: list[str] = []

    def texts() -> Iterator[str]:
        for dataset in opened:
            count = max(1, int(len(dataset) * share))
            for i in progress(
                np.linspace(0, len(dataset) - 1, count).astype(int), total=count, label=f"read {dataset.name}"
            ):
                try:
                    segments = dataset[int(i)].segments
                except RecordError as e:
                    damaged.append(str(e))
                    continue
                for segment in segments:
                    if isinstance(segment, Text) and segment.text:
                        yield segment.text

    found = texts()
    first = next(found, None)
    if first is None:
        raise TextError(f"{', '.join(map(str, datasets))}: no raw text to train on. Name raw datasets.")
    trained = TextTokenizer.train(itertools.chain([first], found), size, superwords)
    if damaged:
        console.print(f"left out {len(damaged)} damaged records; the first: {damaged[0]}")
    write_atomic(out, trained.model)
    return trained
