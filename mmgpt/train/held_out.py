"""The loss on held-out rows, source by source."""

import jax
import numpy as np

from mmgpt.data.loader import Rows
from mmgpt.dist import hosts
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

    def __call__(self, opened: Opened) -> dict[str, float] | None:
        """Means by source, `source/metric`: sums, weights and counts are added up over the batches first.

        None where several processes are to stop, which they do between two batches.
        """
        values: dict[str, float] = {}
        for source, batches in self._batches.items():
            losses = []
            for batch in batches:
                if hosts.preempted_within("an evaluation"):
                    return None
                loss = self._evaluate(opened.params, opened.variables, batch)
                losses.append(jax.tree.map(lambda part: np.asarray(part, np.float64), loss))
            whole: Loss = jax.tree.map(lambda *parts: sum(parts), *losses)
            pairs = {name: (float(total), float(weight)) for name, (total, weight) in whole.figures().items()}
            values |= {f"{source}/{name}": total / weight for name, (total, weight) in pairs.items() if weight > 0}
        return values
