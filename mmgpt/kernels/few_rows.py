"""Products of few rows on a CPU: a gated feed-forward layer as fused products and sums.

The CPU's matmul packs the weights anew for every call, which takes longer than multiplying 8 to 16 rows with them. A
fused product and sum reads them once, as they lie: 0.75 of the time for 8 rows of a layer of 768 x 2,688.
"""

import functools

import jax
import jax.numpy as jnp

from mmgpt.dist import axes as rules

LEAST, MOST = 8, 16
"""Rows between which it was measured to be faster; with 2 a step takes three times as long."""


def pays(rows: int) -> bool:
    """Whether a step of so many rows gains by it: on a CPU whose compiler fuses the product with the sum."""
    return LEAST <= rows <= MOST and jax.default_backend() == "cpu" and _fused()


def gated(x_BTD: jax.Array, gate_FD: jax.Array, up_FD: jax.Array, down_DF: jax.Array) -> jax.Array:
    """`down(silu(gate(x)) * up(x))` of weights whose outputs come first, `[B, T, D]` float32."""
    x = rules.spec("batch seq embed", rules.ACT)
    into, out = (rules.spec(axes, rules.USE) for axes in ("mlp embed", "embed mlp"))

    def local(x_BTD: jax.Array, gate_FD: jax.Array, up_FD: jax.Array, down_DF: jax.Array) -> jax.Array:
        x_RD = x_BTD.reshape(-1, x_BTD.shape[-1])
        gate = _product(x_RD, gate_FD)
        part = _product(gate * jax.nn.sigmoid(gate) * _product(x_RD, up_FD), down_DF)
        return jax.lax.psum(part, rules.ACT["mlp"]).reshape(x_BTD.shape)

    return jax.shard_map(local, in_specs=(x, into, into, out), out_specs=x)(x_BTD, gate_FD, up_FD, down_DF)


def _product(x_RI: jax.Array, w_OI: jax.Array) -> jax.Array:
    """`[R, O]`; with the weights as the left side, the kernel reads them as they lie."""
    return jnp.sum(w_OI[None, :, :] * x_RI[:, None, :], axis=-1)


@functools.cache
def _fused() -> bool:
    """Whether this version's CPU compiler makes one library kernel of both; else they take ten times the matmul."""
    x, w = (jax.ShapeDtypeStruct((n, 64), jnp.float32) for n in (4, 128))
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        text = jax.jit(_product).lower(x, w).compile().as_text()
    return "ynn_fusion" in (text or "")
