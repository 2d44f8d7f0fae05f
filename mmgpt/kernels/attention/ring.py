"""Attention over keys that go round a ring of devices: each has a part of a row's queries and of its keys.

In step s a device works on the keys of the device s places before it, by a block plan of its own for those keys, while
they are already on their way to the next one. A step in which its queries see nothing of them is passed over. What the
steps find is merged by the logarithms of their sums (arXiv 2310.01889); in the backward pass the gradients of keys and
values travel with them and come home in the end.

Any implementation that works by plans can go round: it gives `solve` and `gradients`, over its own layout of arrays.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmgpt.core.stream import Visibility
from mmgpt.kernels.attention import plan
from mmgpt.kernels.attention.logits import kept, merged
from mmgpt.kernels.attention.plan import Blocks, Plan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring:
    """The plans of a device's queries, every array of them with a step of the ring in front; `axis` of the mesh."""

    plans: Plan
    axis: str = dataclasses.field(metadata={"static": True})


def make(visibility: Visibility, blocks: Blocks, axis: str) -> Ring:
    """The ring over `axis`, inside shard_map: `visibility` has this device's queries and the keys of the whole row."""
    devices, here = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    part = visibility.index.shape[1] // devices

    def of_step(step: jax.Array) -> Plan:
        first = (here - step) % devices * part
        keys = {
            name: jax.lax.dynamic_slice_in_dim(getattr(visibility, name), first, part, axis=1)
            for name in ("index", "key_island")
        }
        return plan.make(dataclasses.replace(visibility, **keys), blocks)

    return Ring(plans=jax.lax.map(of_step, jnp.arange(devices, dtype=jnp.int32)), axis=axis)


class Steps(NamedTuple):
    """What an implementation does in one step, over arrays in its own layout, sums `[...]` of outputs `[..., K]`.

    `solve(static, q, k, v, sinks, plan, bound)` gives `(out, lse)` and what it keeps; `gradients(static, (q, k, v,
    sinks, plan, out, lse), (d_out, d_lse))` those of q, k, v and more, also where out and lse are over more keys.
    """

    solve: Callable[..., Any]
    gradients: Callable[..., tuple[Any, ...]]
    static: Any


def _passed_on(arrays: Any, axis: str) -> Any:
    """What the device before this one has."""
    devices = jax.lax.axis_size(axis)
    return jax.lax.ppermute(arrays, axis, [(i, (i + 1) % devices) for i in range(devices)])


def attention(
    steps: Steps, q: jax.Array, k: jax.Array, v: jax.Array, ring: Ring, bound: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """`(out, lse)` of the device's own queries over the keys of all devices, differentiable."""
    solved: Any = _attention(steps, q, k, v, ring, bound)
    return solved


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(steps: Steps, q, k, v, ring: Ring, bound) -> tuple[jax.Array, jax.Array]:
    return _forward(steps, q, k, v, ring, bound)[0]


def _forward(steps: Steps, q, k, v, ring: Ring, bound) -> Any:
    def step(carry: Any, plan: Plan) -> tuple[Any, None]:
        (k, v), sums = carry
        following = _passed_on((k, v), ring.axis)

        def worked() -> tuple[jax.Array, jax.Array]:
            return merged(sums, steps.solve(steps.static, q, k, v, None, plan, bound)[0])

        found = jax.lax.cond(plan.any(), worked, lambda: sums)
        return (following, found), None

    nothing = jnp.zeros(q.shape[:-1] + v.shape[-1:], jnp.float32), jnp.full(q.shape[:-1], -jnp.inf, jnp.float32)
    (_, (out, lse)), _ = jax.lax.scan(step, ((k, v), nothing), ring.plans)
    out, lse = kept(out.astype(v.dtype), lse)
    return (out, lse), (q, k, v, ring, out, lse)


def _backward(steps: Steps, saved: Any, cotangents: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    q, k, v, ring, out, lse = saved

    def step(carry: Any, plan: Plan) -> tuple[Any, None]:
        (k, v), dq, (dk, dv) = carry
        # Sums of gradients set out before this step's are known, so that their way too is hidden behind the work.
        following, before = _passed_on((k, v), ring.axis), _passed_on((dk, dv), ring.axis)

        def worked() -> tuple[jax.Array, Any]:
            own, own_dk, own_dv, *_ = steps.gradients(steps.static, (q, k, v, None, plan, out, lse), cotangents)
            return dq + own.astype(jnp.float32), (own_dk, own_dv)

        dq, found = jax.lax.cond(plan.any(), worked, lambda: (dq, (jnp.zeros_like(k), jnp.zeros_like(v))))
        return (following, dq, tuple(x + y.astype(jnp.float32) for x, y in zip(before, found, strict=True))), None

    dq, dk, dv = (jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    (_, dq, of_keys), _ = jax.lax.scan(step, ((k, v), dq, (dk, dv)), ring.plans)
    dk, dv = _passed_on(of_keys, ring.axis)  # the last step's keys are those of the device behind
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_attention.defvjp(_forward, _backward)
