"""The optimizer: AdamW under a schedule, from optax, with its state as a plain dict of named arrays."""

from typing import Any, Literal

import jax
import optax

from mmgpt.core import config


class Optimizer:
    class Config(config.Config):
        """AdamW (arXiv 1711.05101). `schedule` shapes the learning rate after `warmup` linear steps.

        "cosine" and "linear" fall to `final` x learning_rate at the last step; "stable" stays constant and falls
        linearly over the last fifth; "constant" stays. Weight decay acts on matrices, not on gains and biases.
        """

        learning_rate: float = 3e-3
        schedule: Literal["cosine", "linear", "stable", "constant"] = "cosine"
        warmup: int = 100
        final: float = 0.1
        b1: float = 0.9
        b2: float = 0.95
        epsilon: float = 1e-8
        weight_decay: float = 0.1
        clip: float = 1.0

        def build(self, steps: int) -> "Optimizer":
            if self.warmup >= steps:
                raise config.ConfigError(
                    f"optimizer.warmup {self.warmup} is not shorter than the run of {steps} steps; lower it."
                )
            return Optimizer(self, steps)

    def __init__(self, c: "Optimizer.Config", steps: int):
        self.schedule = _schedule(c, steps)
        self._transform = optax.chain(
            optax.clip_by_global_norm(c.clip),
            optax.scale_by_adam(c.b1, c.b2, c.epsilon),
            optax.add_decayed_weights(c.weight_decay, mask=_decayed),
            optax.scale_by_learning_rate(self.schedule),
        )

    def init(self, params: Any) -> dict[str, jax.Array]:
        """Named state arrays, laid out like the parameters they belong to."""
        return dict(_named(self._transform.init(params)))

    def update(self, grads: Any, state: dict[str, jax.Array], params: Any) -> tuple[Any, dict[str, jax.Array]]:
        """New parameters and new state."""
        template = jax.eval_shape(self._transform.init, params)
        names = [name for name, _ in _named(template)]
        tree = jax.tree.unflatten(jax.tree.structure(template), [state[name] for name in names])
        updates, tree = self._transform.update(grads, tree, params)
        return optax.apply_updates(params, updates), dict(_named(tree))


def _decayed(params: Any) -> Any:
    """True for matrices: a stacked gain `[layers, D]` is still a gain, so the name decides and not the rank."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key not in ("scale", "bias"), params)


def _named(tree: Any) -> list[tuple[str, jax.Array]]:
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in jax.tree.leaves_with_path(tree)
    ]


def _schedule(c: Optimizer.Config, steps: int) -> optax.Schedule:
    peak, rest = c.learning_rate, steps - c.warmup
    if c.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, c.final)
    elif c.schedule == "linear":
        after = optax.linear_schedule(peak, peak * c.final, rest)
    elif c.schedule == "stable":
        fall = max(1, steps // 5)
        after = optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, peak * c.final, fall)], [max(0, rest - fall)]
        )
    else:
        after = optax.constant_schedule(peak)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, c.warmup), after], [c.warmup])
