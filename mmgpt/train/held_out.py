"""The loss on held-out rows, source by source."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mmgpt.core.stream import Batch
from mmgpt.data.loader import Rows
from mmgpt.objectives.objective import Loss
from mmgpt.train.feed import Share, place_part
from mmgpt.train.run import Built, Opened
from mmgpt.train.step import make_evaluation


class HeldOut:
    """Some batches of each source, always the same, that stay on the devices."""

    def __init__(self, built: Built, rows: Rows, share: Share) -> None:
        self._evaluate = make_evaluation(built.structure, built.objective)
        self._batches = {
            name: [place_part(batch, share) for batch in rows.held_out_batches(name, built.run.held_out_batches)]
            for name in rows.sources
        }

    def __call__(self, opened: Opened) -> dict[str, float]:
        """Means by source, `source/metric`: sums, weights and counts are added up over the batches first."""
        return evaluate(self._evaluate, opened, self._batches)


def evaluate(evaluation: Callable[..., Any], opened: Opened, held_out: dict[str, list[Batch]]) -> dict[str, float]:
    """Means over batches by source."""
    values: dict[str, float] = {}
    for source, batches in held_out.items():
        losses = [evaluation(opened.params, opened.variables, batch) for batch in batches]
        whole: Loss = jax.tree.map(lambda *parts: sum(np.asarray(part, np.float64) for part in parts), *losses)
        pairs = {name: (float(total), float(weight)) for name, (total, weight) in whole.figures().items()}
        values |= {f"{source}/{name}": total / weight for name, (total, weight) in pairs.items() if weight > 0}
    return values
