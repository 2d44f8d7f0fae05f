"""Training an action tokenizer on the robot actions of raw datasets."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mmgpt.core.document import Action
from mmgpt.core.log import check_writable, console, progress
from mmgpt.data.codec import RecordError
from mmgpt.data.record import Dataset
from mmgpt.tokens import actions
from mmgpt.tokens.actions import ActionError, ActionTokenizer


def train_actions(
    datasets: list[Path], out: Path, size: int, most: int, scale: float, overwrite: bool = False
) -> ActionTokenizer:
    """Trains on at most `most` documents, spread evenly over all datasets, and writes the tokenizer to `out`."""
    if most < 1:
        raise ActionError(f"--most is {most}; give the documents to train on at most, 1 or more.")
    if out.exists() and not overwrite:
        raise ActionError(
            f"{out} is there, and datasets may be tokenised with it. Give another --out, or --overwrite True."
        )
    check_writable(out)
    opened = [Dataset(path) for path in datasets]
    share = min(1.0, most / max(1, sum(len(d) for d in opened)))
    damaged: list[str] = []

    def chunks() -> Iterator[np.ndarray]:
        for dataset in opened:
            count = min(len(dataset), max(1, int(len(dataset) * share)))
            chosen = np.linspace(0, len(dataset) - 1, count).astype(int)
            for i in progress(chosen, total=count, label=f"read {dataset.name}"):
                try:
                    segments = dataset[int(i)].segments
                except RecordError as e:
                    damaged.append(str(e))
                    continue
                yield from (s.values for s in segments if isinstance(s, Action) and s.values is not None)

    trained = actions.train(chunks(), size, scale)
    if damaged:
        console.print(f"left out {len(damaged)} damaged records; the first: {damaged[0]}")
    trained.save(out)
    return trained
