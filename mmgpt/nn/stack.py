"""A stack of equal layers: parameters with a leading `layers` axis, scanned or unrolled, rematerialised by policy."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

Remat = Literal["none", "matmuls", "projections", "attention", "full", "offload"]
"""What the backward pass recomputes, from nothing to everything inside a layer.

"matmuls" keeps the outputs of all matmuls but the last; "projections" those around attention, and attention's output;
"attention" that output alone; "full" nothing but a layer's input. "offload" is "attention" with all of it in the host's
memory.
"""

KEPT: dict[str, tuple[str, ...]] = {
    "matmuls": ("attention", "projections", "mlp"),
    "projections": ("attention", "projections"),
    "attention": ("attention",),
    "full": (),
}
"""What a policy keeps: values that layers and kernels give these names by `jax.ad_checkpoint.checkpoint_name`."""


def _policy(remat: Remat) -> Any:
    policies = jax.checkpoint_policies
    if remat == "offload":
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=(),
            names_which_can_be_offloaded=("input", *KEPT["attention"]),
            offload_src="device",
            offload_dst="pinned_host",
        )
    return policies.save_only_these_names(*KEPT[remat])


class Stack(nnx.Module):
    """`layers` copies of one module made by `make(rngs)`; each parameter gains a leading axis.

    A stacked parameter keeps the logical axes of one layer, which is what its slice has inside the loop.
    """

    def __init__(
        self, rngs: nnx.Rngs, make: Callable[[nnx.Rngs], nnx.Module], layers: int, *, scan: bool, remat: Remat
    ):
        keys = jax.random.split(rngs.params(), layers)
        # The structure is traced by the first layer; vmap then makes all of them without a second kind of init.
        structure = nnx.graphdef(nnx.eval_shape(lambda key: make(nnx.Rngs(params=key)), keys[0]))
        state = jax.vmap(lambda key: nnx.state(make(nnx.Rngs(params=key))))(keys)
        self.stacked = nnx.merge(structure, state)
        self.layers = layers
        self.scan = scan
        self.remat: Remat = remat

    def __call__(self, call: Callable[[Any, jax.Array, Any], jax.Array], x: jax.Array, per_layer: Any) -> jax.Array:
        """`x = call(layer_i, x, per_layer[i])` through all layers; `per_layer` leaves have a leading layer axis."""
        structure, state = nnx.split(self.stacked)

        def layer(x: jax.Array, inputs: tuple[Any, Any]) -> tuple[jax.Array, None]:
            slices, extra = inputs
            return call(nnx.merge(structure, slices), checkpoint_name(x, "input"), extra), None

        if self.remat != "none":
            layer = jax.checkpoint(layer, policy=_policy(self.remat), prevent_cse=not self.scan)
        if self.scan:
            return jax.lax.scan(layer, x, (state, per_layer))[0]
        for i in range(self.layers):
            x, _ = layer(x, jax.tree.map(lambda leaf, i=i: leaf[i], (state, per_layer)))
        return x

    def fold(self, call: Callable[[Any, jax.Array, Any], Any], carry: Any) -> Any:
        """`carry = call(layer_i, i, carry)` through all layers, scanned, for decoding: no gradient is taken."""
        structure, state = nnx.split(self.stacked)

        def layer(carry: Any, inputs: tuple[Any, jax.Array]) -> tuple[Any, None]:
            slices, number = inputs
            return call(nnx.merge(structure, slices), number, carry), None

        return jax.lax.scan(layer, carry, (state, jnp.arange(self.layers)))[0]

    def unstacked(self) -> list[Any]:
        """The layers as modules of their own, for decoding, where a scan costs more than the layers (on CPU twice)."""
        structure, state = nnx.split(self.stacked)
        return [nnx.merge(structure, jax.tree.map(lambda leaf, i=i: leaf[i], state)) for i in range(self.layers)]
