"""The optimizer: AdamW, Muon or Adafactor under a schedule, from optax, its state a plain dict of named arrays."""

import math
from collections.abc import Hashable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from mmgpt.core import config
from mmgpt.dist.axes import by_layer


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
            return Optimizer(self, steps)

        def transform(self, steps: int) -> optax.GradientTransformation:
            """Gradients to steps. ConfigError where the run of `steps` is too short for it."""
            if not 0.0 <= self.learning_rate < math.inf:
                raise config.ConfigError(f"optimizer.learning_rate is {self.learning_rate}; give 0 or more.")
            if self.warmup >= steps:
                raise config.ConfigError(
                    f"optimizer.warmup {self.warmup} is not shorter than the run of {steps} steps; lower it."
                )
            return optax.chain(
                optax.clip_by_global_norm(self.clip),
                self.direction(),
                optax.add_decayed_weights(self.weight_decay, mask=_decayed),
                optax.scale_by_learning_rate(_schedule(self, steps)),
            )

        def direction(self) -> optax.GradientTransformation:
            """Gradients to the direction of a step, before weight decay and learning rate."""
            return optax.scale_by_adam(self.b1, self.b2, self.epsilon)

    def __init__(self, c: "Optimizer.Config", steps: int):
        self._transform = c.transform(steps)
        self.schedule = _schedule(c, steps)

    def init(self, params: Any) -> dict[str, jax.Array]:
        """Named state arrays, laid out like the parameters they belong to."""
        return dict(_named(self._transform.init(params)))

    def update(self, grads: Any, state: dict[str, jax.Array], params: Any) -> tuple[Any, dict[str, jax.Array]]:
        """New parameters and new state."""
        template = jax.eval_shape(self._transform.init, params)
        names = [name for name, _ in _named(template)]
        tree = jax.tree.unflatten(jax.tree.structure(template), [state[name] for name in names])
        updates, tree = _anywhere(self._transform.update)(grads, tree, params)
        return optax.apply_updates(params, updates), dict(_named(tree))


class Muon(Optimizer.Config):
    """Momentum made orthogonal for the layers' matrices (arXiv 2502.16982), AdamW with Nesterov momentum for all else.

    `consistent` scales a matrix's step to this root mean square, so that learning rates fit both. Newton-Schulz takes
    `iterations` steps.
    """

    momentum: float = 0.95
    iterations: int = 5
    consistent: float = 0.2

    def direction(self) -> optax.GradientTransformation:
        muon = optax.contrib.muon(
            1.0,
            ns_steps=self.iterations,
            beta=self.momentum,
            consistent_rms=self.consistent,
            muon_weight_dimension_numbers=lambda params: jax.tree.map_with_path(_matrix, params),
        )
        matrices = _by_layer(optax.chain(muon, optax.scale(-1.0)))  # it has already turned downhill
        rest = optax.scale_by_adam(self.b1, self.b2, self.epsilon, nesterov=True)

        def label(path: Any, leaf: jax.Array) -> str:
            return "rest" if _matrix(path, leaf) is None else "matrix"

        return optax.partition({"matrix": matrices, "rest": rest}, lambda params: jax.tree.map_with_path(label, params))


class Adafactor(Optimizer.Config):
    """Second moments of rows and columns in place of every weight's (arXiv 1804.04235), as arXiv 2106.04560 has it.

    A layer's weight is factored over its two largest dimensions where both have `smallest` or more; other weights keep
    all their second moments. Their decay is 1 - step^-0.8, at most `b2`. A weight's direction has at most this root
    mean square, `clip_update`. `b1` above 0 adds a first moment in bfloat16.
    """

    b1: float = 0.0
    b2: float = 0.999
    epsilon: float = 1e-30
    clip_update: float = 1.0
    smallest: int = 32

    def direction(self) -> optax.GradientTransformation:
        def decay(step: Any, power: Any) -> jax.Array:
            return jnp.minimum(1.0 - (step + 1.0) ** -power, self.b2)

        factored = optax.scale_by_factored_rms(
            min_dim_size_to_factor=self.smallest, epsilon=self.epsilon, decay_rate_fn=decay
        )
        moment = [optax.ema(self.b1, debias=False, accumulator_dtype=jnp.bfloat16)] if self.b1 > 0.0 else []
        return _each_layer(optax.chain(factored, optax.clip_by_block_rms(self.clip_update), *moment))


class Group(config.Config):
    """The parameters below `path` (as in "discriminator") and their optimizer; None freezes them, without moments."""

    path: str
    optimizer: Optimizer.Config | None = None


class Grouped(Optimizer.Config):
    """Groups of parameters with an optimizer and a clipped norm each; the other fields are of all that is in none."""

    groups: tuple[Group, ...]

    def transform(self, steps: int) -> optax.GradientTransformation:
        transforms: dict[Hashable, optax.GradientTransformation] = {_REST: super().transform(steps)}
        for group in self.groups:
            of_group = group.optimizer
            transforms[group.path] = optax.set_to_zero() if of_group is None else of_group.transform(steps)

        def label(path: Any, _: jax.Array) -> str:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return next((g.path for g in self.groups if f"{name}/".startswith(f"{g.path}/")), _REST)

        def labels(params: Any) -> Any:
            found = jax.tree.map_with_path(label, params)
            missing = {g.path for g in self.groups} - set(jax.tree.leaves(found))
            if missing:
                raise config.ConfigError(
                    f"optimizer.groups: no parameter lies below {', '.join(sorted(missing))}; the model has "
                    f"{', '.join(sorted(map(str, params)))}."
                )
            return found

        return optax.partition(transforms, labels)


_REST = "rest"
"""Names the state of what no group holds."""


def _by_layer(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """A transformation of stacked layers that works each out on one device, where their number divides.

    The compiler left alone splits every matrix, and Newton-Schulz then talks between devices in each product.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return by_layer(transform.update, updates, state, params)

    return optax.GradientTransformation(transform.init, update)


def _each_layer(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """A transformation to which each layer of a stacked weight is a weight of its own."""
    stacked = optax.GradientTransformation(jax.vmap(transform.init), jax.vmap(transform.update))

    def label(path: Any, leaf: jax.Array) -> str:
        return str(leaf.shape[0]) if _stacked(path) else _REST  # a vmap goes over as many layers in every weight

    def apart(params: Any) -> optax.GradientTransformation:
        labels = jax.tree.map_with_path(label, params)
        transforms: dict[Hashable, optax.GradientTransformation] = dict.fromkeys(jax.tree.leaves(labels), stacked)
        return optax.partition(transforms | {_REST: transform}, labels)

    return optax.GradientTransformation(
        lambda params: apart(params).init(params),
        lambda updates, state, params=None: apart(params).update(updates, state, params),
    )


def _stacked(path: Any) -> bool:
    return any(part.key == "stacked" for part in path)


def _matrix(path: Any, leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
    """Which axes of a stacked parameter make its matrix; None for what is no matrix of a layer."""
    if not _stacked(path) or leaf.ndim < 3:
        return None
    return optax.contrib.MuonDimensionNumbers(reduction_axis=(1,), output_axis=tuple(range(2, leaf.ndim)))


def _decayed(params: Any) -> Any:
    """True for matrices: a stacked gain `[layers, D]` is still a gain, so the name decides and not the rank."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key.split("_")[-1] not in ("scale", "bias"), params)


def _anywhere(update: Any) -> Any:
    """An update whose inner shardings the compiler chooses: what goes in and what comes out stays as laid out."""

    def wrapped(grads: Any, tree: Any, params: Any) -> Any:
        out = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, (params, tree))
        automatic: Any = jax.sharding.auto_axes(update, out_sharding=out)
        return automatic(grads, tree, params)

    return wrapped


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
