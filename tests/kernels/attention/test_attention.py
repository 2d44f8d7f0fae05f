"""Every implementation of attention against the rule written out in float64 loops, forward and backward."""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmgpt.core.stream import Visibility
from mmgpt.kernels.attention import api
from mmgpt.kernels.attention.cases import CASES, TOLERANCES, Case
from mmgpt.kernels.attention.reference import visible

IMPLEMENTATIONS = typing.get_args(api.Implementation)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def sees(seen: Visibility, b: int, t: int) -> list[int]:
    """The keys that one query sees, by the words of the rule."""
    return [
        s
        for s in range(seen.index.shape[1])
        if seen.start[b, t] <= seen.index[b, s] < seen.stop[b, t]
        and (seen.key_island[b, s] == 0 or seen.key_island[b, s] == seen.island[b, t])
    ]


def by_loops(case: Case, q, k, v, sinks) -> tuple[np.ndarray, np.ndarray]:
    """Attention in float64, one query and head after another."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    for b, t, h in np.ndindex(q.shape[:3]):
        keys, g = sees(case.visibility, b, t), h // (case.heads // case.kv_heads)
        logits = k[b, keys, g] @ q[b, t, h] * scale
        if case.soft_cap is not None:
            logits = case.soft_cap * np.tanh(logits / case.soft_cap)
        all_logits = logits if sinks is None else np.append(logits, float(sinks[h]))
        if len(all_logits):
            highest = all_logits.max()
            total = np.exp(all_logits - highest).sum()
            lse[b, t, h] = np.log(total) + highest
            out[b, t, h] = np.exp(logits - lse[b, t, h]) @ v[b, keys, g]
    return out, lse


def options(case: Case) -> dict:
    return {"scale": case.scale, "soft_cap": case.soft_cap}


def inputs(case: Case):
    q, k, v, sinks = case.arrays()
    q, k, v = (jnp.asarray(x, case.dtype) for x in (q, k, v))
    return q, k, v, None if sinks is None else jnp.asarray(sinks)


def weights(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """What outputs and lse are multiplied with to make the loss that is differentiated."""
    rng = np.random.default_rng(1)
    shape = (*case.visibility.start.shape, case.heads)
    return tuple(rng.standard_normal(s).astype(np.float32) for s in ((*shape, case.head_dim), shape))


@functools.cache
def solved(case: Case, implementation):
    """Outputs, lse, and the gradients of a weighted sum of both."""
    weight, lse_weight = weights(case)

    def loss(arrays):
        q, k, v, *sinks = arrays
        out, lse = api.attention(
            q, k, v, case.visibility, sinks=(sinks or [None])[0], implementation=implementation, **options(case)
        )
        value = jnp.sum(out * weight, dtype=jnp.float32)
        return value + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0) * lse_weight), (out, lse)

    arrays = [x for x in inputs(case) if x is not None]
    grads, (out, lse) = jax.jit(jax.grad(loss, has_aux=True))(arrays)
    return out, lse, grads


@every_case
def test_visible_is_the_rule(case: Case) -> None:
    mask = np.asarray(visible(case.visibility))
    for b, t in np.ndindex(mask.shape[:2]):
        assert np.flatnonzero(mask[b, t]).tolist() == sees(case.visibility, b, t)


@every
@every_case
def test_forward(case: Case, implementation) -> None:
    q, k, v, sinks = inputs(case)
    out, lse, _ = solved(case, implementation)
    expected, expected_lse = by_loops(case, q, k, v, sinks)
    assert out.dtype == v.dtype and lse.dtype == jnp.float32 and lse.shape == q.shape[:3]
    tolerance = TOLERANCES[case.dtype][0]
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=tolerance)


@every
@every_case
def test_gradients(case: Case, implementation) -> None:
    """Along random directions, central differences of the float64 loops; lse counts too where it is finite."""
    q, k, v, sinks = inputs(case)
    rng = np.random.default_rng(2)
    weight, lse_weight = weights(case)

    def loss_by_loops(*arrays):
        out, lse = by_loops(case, *arrays)
        return np.sum(out * weight) + np.sum(np.where(np.isfinite(lse), lse, 0.0) * lse_weight)

    arrays = [x for x in (q, k, v, sinks) if x is not None]
    fill = (None,) * (4 - len(arrays))
    grads = solved(case, implementation)[2]
    plain = [np.asarray(x, np.float64) for x in arrays]
    for i, grad in enumerate(grads):
        grad = np.asarray(grad, np.float64)
        assert np.isfinite(grad).all()
        direction = rng.standard_normal(grad.shape)
        direction /= np.linalg.norm(direction)
        ends = [loss_by_loops(*plain[:i], plain[i] + e * direction, *plain[i + 1 :], *fill) for e in (1e-4, -1e-4)]
        expected = (ends[0] - ends[1]) / 2e-4
        assert abs(np.sum(grad * direction) - expected) <= TOLERANCES[case.dtype][1] * max(1.0, np.abs(grad).max())


@every
def test_who_sees_nothing_gets_zeros_and_gives_no_gradient(implementation) -> None:
    case = next(c for c in CASES if c.name == "nothing")
    q, k, v, _ = inputs(case)
    blind = ~np.asarray(visible(case.visibility)).any(axis=-1)
    assert blind.sum() == 3 + 8
    out, lse = api.attention(q, k, v, case.visibility, implementation=implementation)
    assert (np.asarray(out)[blind] == 0).all() and (np.asarray(lse)[blind] == -np.inf).all()
    gq, gk, gv = jax.grad(
        lambda *a: jnp.sum(api.attention(*a, case.visibility, implementation=implementation)[0] ** 2), argnums=(0, 1, 2)
    )(q, k, v)
    assert all(np.isfinite(g).all() for g in (gq, gk, gv))
    assert (np.asarray(gq)[blind] == 0).all() and (np.asarray(gk)[1] == 0).all() and (np.asarray(gv)[1] == 0).all()


@every
def test_a_key_that_is_not_seen_does_not_matter(implementation) -> None:
    """Not even when it is infinite or no number, as an unwritten cache slot may be."""
    case = next(c for c in CASES if c.name == "cached")
    q, k, v, _ = inputs(case)
    seen = np.asarray(visible(case.visibility)).any(axis=1)
    unseen = jnp.asarray(~seen)[:, :, None, None]
    plain = api.attention(q, k, v, case.visibility, implementation=implementation)
    other = api.attention(
        q, jnp.where(unseen, 1e4, k), jnp.where(unseen, 1e4, v), case.visibility, implementation=implementation
    )
    for a, b in zip(plain, other, strict=True):
        assert np.array_equal(a, b)


@every
def test_twice_is_the_same_bit_for_bit(implementation) -> None:
    case = next(c for c in CASES if c.name == "long")
    arrays = inputs(case)[:3]

    @jax.jit
    def both(*arrays):
        return jax.value_and_grad(
            lambda *a: jnp.sum(api.attention(*a, case.visibility, implementation=implementation)[0] ** 2),
            argnums=(0, 1, 2),
        )(*arrays)

    first, second = both(*arrays), both(*arrays)
    assert jax.tree.all(jax.tree.map(np.array_equal, first, second))


def test_dropout_keeps_the_mean_and_needs_a_key() -> None:
    case = next(c for c in CASES if c.name == "long")
    q, k, v, _ = inputs(case)
    plain = api.attention(q, k, v, case.visibility)[0]
    assert np.array_equal(api.attention(q, k, v, case.visibility, dropout=0.5)[0], plain)
    keys = jax.random.split(jax.random.key(0), 400)
    dropped = jax.lax.map(lambda key: api.attention(q, k, v, case.visibility, dropout=0.5, key=key)[0], keys)
    assert not np.array_equal(dropped[0], dropped[1])
    np.testing.assert_allclose(np.mean(dropped, axis=0), plain, atol=0.5)
    assert abs(np.mean(np.asarray(dropped) - np.asarray(plain)[None])) < 5e-3


def test_wrong_use_is_told() -> None:
    q, k, v, _ = inputs(CASES[0])
    with pytest.raises(ValueError, match="3 query heads do not divide into 2 key heads"):
        api.attention(q[:, :, :3], k, v, CASES[0].visibility)
    with pytest.raises(ValueError, match="unknown implementation 'fast'; there is 'reference'"):
        api.attention(q, k, v, CASES[0].visibility, implementation="fast")  # pyright: ignore
