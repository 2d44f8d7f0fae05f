"""What implementations of attention share: options, logits in units of log 2, when they need no maximum, merging."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

LOG2E = float(np.log2(np.e))
LOWEST = -1e30
"""Where a running maximum begins: finite, so that a masked logit of -inf weighs exp2(-inf) = 0 from the start."""
UNSEEN = 1e30
"""The log of the sum of a query that sees nothing: its weights are exp2(s - UNSEEN) = 0."""
MOST_BOUND = 64.0
"""Up to this bound on the logits, their exponentials, and sums of 2^30 of them, are in float32's range as they are."""


class Options(NamedTuple):
    """What a kernel is compiled for: `bounded` logits need no maximum, None where only the step tells; `sinks` start
    the sums.
    """

    soft_cap: float | None
    bounded: bool | None = False
    sinks: bool = False

    @property
    def query_factor(self) -> float:
        """What queries, or their products with keys, are multiplied with besides the scale."""
        return LOG2E if self.soft_cap is None else 1.0 / self.soft_cap


def product(a: jax.Array, b: jax.Array, over_a: int, over_b: int) -> jax.Array:
    """The product over one dimension of each, in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    numbers = (((over_a,), (over_b,)), ((), ()))
    return jax.lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=jnp.float32)


def capped(s: jax.Array, soft_cap: float | None) -> tuple[jax.Array, jax.Array | None]:
    """Logits in units of log 2, and what the soft cap multiplies their gradient by."""
    if soft_cap is None:
        return s, None
    t = jnp.tanh(s)
    return t * (soft_cap * LOG2E), 1.0 - t * t


def settled(logit_bound: float | jax.Array | None, options: Options) -> tuple[Options, jax.Array | None]:
    """The options with what is known of the logits' bound, and what only the running step knows.

    A sink is no logit, and may be any size: it needs the maximum.
    """
    capped = options.soft_cap is not None and options.soft_cap <= MOST_BOUND
    if isinstance(logit_bound, jax.Array) and not (options.sinks or capped):
        return options, logit_bound <= MOST_BOUND
    known = capped or (not isinstance(logit_bound, jax.Array) and logit_bound is not None and logit_bound <= MOST_BOUND)
    return options._replace(bounded=known and not options.sinks), None


def solved_for(options: Options, bound: jax.Array | None, solve: Callable[[Options], Any]) -> Any:
    """`solve(options)`, as the step runs bounded or not where only `bound` tells."""
    if bound is None:
        return solve(options)
    both = (functools.partial(solve, options._replace(bounded=said)) for said in (True, False))
    return jax.lax.cond(bound, *both)


def kept(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What the backward pass needs, under the name by which remat policies keep it (`nn/stack.py`)."""
    return checkpoint_name(out, "attention"), checkpoint_name(lse, "attention")


def filled(x_BTHK: jax.Array, size: int) -> jax.Array:
    """Positions filled up with zeros to a multiple of `size`."""
    return jnp.pad(x_BTHK, ((0, 0), (0, -x_BTHK.shape[1] % size), (0, 0), (0, 0)))


def merged(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Attention over two sets of keys from `(out [..., K], lse [...])` over each, in float32; -inf of both stays."""
    lse = jnp.logaddexp(a[1], b[1])
    finite = jnp.where(jnp.isneginf(lse), 0.0, lse)
    first, second = (jnp.exp(own - finite)[..., None] * out.astype(jnp.float32) for out, own in (a, b))
    return first + second, lse
