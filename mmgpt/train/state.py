"""The state of a run as a plain nested dict {params, variables, optimizer, ema, step}, and how it is made."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmgpt.dist import axes as rules
from mmgpt.dist.mesh import Mesh
from mmgpt.nn.param import Keys, Variable
from mmgpt.train.optimizer import Optimizer

State = dict[str, Any]


class Structure:
    """A model without its arrays: merges parameters back into a module and makes fresh ones.

    `build(rngs)` makes the module; `seed` fixes its initial values.
    """

    def __init__(self, build: Callable[[nnx.Rngs], nnx.Module], seed: int):
        self._build = build
        self._seed = seed
        try:
            module = nnx.eval_shape(self._make)
        except rules.ShardingError:
            self._name_what_does_not_fit()
            raise
        self._graph, self._params, self._variables = nnx.split(module, nnx.Param, Variable)

    def _make(self) -> nnx.Module:
        return self._build(Keys(jax.random.key(self._seed)))

    def _name_what_does_not_fit(self) -> None:
        """Raises ShardingError with the path of the first array that the mesh cannot hold; one device holds all."""
        with jax.set_mesh(Mesh.Config().build(jax.devices()[:1])):
            arrays = nnx.to_flat_state(nnx.state(nnx.eval_shape(self._make)))
        for path, leaf in arrays:
            names = leaf.axes.split()
            shape = leaf.get_value().shape[-len(names) :]  # without the layers of a stack
            rules.stored(leaf.axes, shape, "parameter " + "/".join(str(p) for p in path))

    def merge(self, params: Any, variables: Any) -> Any:
        """The module with these arrays in it; shares them, copies nothing."""
        p, v = nnx.clone(self._params), nnx.clone(self._variables)
        nnx.replace_by_pure_dict(p, params)
        nnx.replace_by_pure_dict(v, variables)
        return nnx.merge(self._graph, p, v)

    def fresh(self) -> tuple[Any, Any]:
        """Initial `(params, variables)` as nested dicts."""
        _, params, variables = nnx.split(self._make(), nnx.Param, Variable)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(variables)

    def abstract(self) -> tuple[Any, Any]:
        """Shapes, dtypes and shardings of `(params, variables)`."""
        return jax.eval_shape(self.fresh)

    def parameters(self) -> int:
        """How many numbers training sets, by a gradient or, as codebooks, by averages."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.abstract()))


def initial(structure: Structure, optimizer: Optimizer, ema: bool) -> State:
    """The state at step 0; call it under jit."""
    return around(optimizer, ema, *structure.fresh())


def around(optimizer: Optimizer, ema: bool, params: Any, variables: Any) -> State:
    """The state at step 0 of a model with these arrays; call it under jit."""
    state: State = {"params": params, "variables": variables, "step": jnp.zeros((), jnp.int32)}
    state["optimizer"] = optimizer.init(params)
    if ema:
        state["ema"] = jax.tree.map(jnp.copy, params)
    return state


def abstract(structure: Structure, optimizer: Optimizer, ema: bool) -> State:
    """Shapes, dtypes and concrete shardings of the state, as a checkpoint restores into."""
    return _concrete(jax.eval_shape(lambda: initial(structure, optimizer, ema)))


def weights(structure: Structure) -> State:
    """The same of `params` and `variables` alone."""
    params, variables = structure.abstract()
    return _concrete({"params": params, "variables": variables})


def _concrete(tree: Any) -> Any:
    mesh = jax.sharding.get_mesh()

    def concrete(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = rules.spec("", rules.USE) if leaf.sharding is None else leaf.sharding.spec
        sharding = jax.sharding.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(concrete, tree)
