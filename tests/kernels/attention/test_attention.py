"""Every implementation of attention against the rule written out in float64, forward and backward."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from mmgpt.core.stream import Visibility, packed_causal
from mmgpt.kernels.attention import api, plan, xla
from mmgpt.kernels.attention.cases import CASES, TOLERANCES, Case, causal
from mmgpt.kernels.attention.reference import visible

make = jax.jit(plan.make, static_argnums=1)
IMPLEMENTATIONS = typing.get_args(api.Implementation)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
QUICK = ("packed", "islands", "nothing", "soft_cap", "sinks")
"""The cases whose interpreted kernels run with the fast tests."""


def pairs() -> list:
    """Every implementation with every case; interpreting a kernel takes seconds, so most of those are slow tests."""
    return [
        pytest.param(
            case,
            name,
            id=f"{name}-{case.name}",
            marks=[pytest.mark.slow] if name.startswith("pallas") and case.name not in QUICK else [],
        )
        for name in IMPLEMENTATIONS
        for case in CASES
    ]


every_pair = pytest.mark.parametrize(("case", "implementation"), pairs())


def sees(seen: Visibility, b: int, t: int) -> list[int]:
    """The keys that one query sees, by the words of the rule."""
    return [
        s
        for s in range(seen.index.shape[1])
        if seen.start[b, t] <= seen.index[b, s] < seen.stop[b, t]
        and (seen.key_island[b, s] == 0 or seen.key_island[b, s] == seen.island[b, t] > 0)
    ]


def exact(case: Case, q, k, v, sinks) -> tuple[np.ndarray, np.ndarray]:
    """Attention in float64, each key head's keys repeated for its query heads."""
    R = case.heads // case.kv_heads
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, R, axis=2) for x in (k, v))
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    logits = np.einsum("bthk,bshk->bhts", q, k, optimize=True) * scale
    if case.soft_cap is not None:
        logits = case.soft_cap * np.tanh(logits / case.soft_cap)
    logits = np.where(mask(case)[:, None], logits, -np.inf)
    sink = np.full(case.heads, -np.inf) if sinks is None else np.asarray(sinks, np.float64)
    sink = np.broadcast_to(sink[None, :, None, None], (*logits.shape[:3], 1))
    highest = np.maximum(logits.max(axis=-1, keepdims=True), sink)
    highest = np.where(np.isfinite(highest), highest, 0.0)
    total = np.sum(np.exp(logits - highest), axis=-1, keepdims=True) + np.exp(sink - highest)
    with np.errstate(divide="ignore"):
        lse = np.log(total) + highest
    weight = np.exp(logits - np.where(np.isfinite(lse), lse, 0.0))
    return np.einsum("bhts,bshk->bthk", weight, v, optimize=True), np.moveaxis(lse[..., 0], 1, 2)


@functools.cache
def mask(case: Case) -> np.ndarray:
    return np.asarray(visible(case.visibility))


def told(case: Case, implementation) -> Visibility | plan.Plan:
    """The visibility as `implementation` takes it, in the case's blocks where it works by blocks."""
    if implementation == "reference":
        return case.visibility
    # A TPU has 128 lanes of queries at least, a GPU's tensor cores 16 rows.
    least = {"pallas_tpu": 128, "pallas_gpu": 16}.get(implementation, 1)
    return make(case.visibility, plan.Blocks(*(max(least, size) for size in case.blocks)))


def attend(*arrays, implementation, **options) -> tuple[jax.Array, jax.Array]:
    """The API; Pallas kernels are interpreted."""
    if implementation.startswith("pallas"):
        options["interpret"] = pltpu.InterpretParams() if implementation == "pallas_tpu" else True
    return api.attention(*arrays, implementation=implementation, **options)


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
        seen, sink = told(case, implementation), (sinks or [None])[0]
        out, lse = attend(q, k, v, seen, sinks=sink, implementation=implementation, **options(case))
        value = jnp.sum(out * weight, dtype=jnp.float32)
        return value + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0) * lse_weight), (out, lse)

    arrays = [x for x in inputs(case) if x is not None]
    grads, (out, lse) = jax.jit(jax.grad(loss, has_aux=True))(arrays)
    return out, lse, grads


@every_case
def test_visible_is_the_rule(case: Case) -> None:
    for b, t in np.ndindex(mask(case).shape[:2]):
        assert np.flatnonzero(mask(case)[b, t]).tolist() == sees(case.visibility, b, t)


def test_the_cases_hold_blocks_of_every_class() -> None:
    made = [told(case, "xla") for case in CASES if case.name in ("nothing", "documents_sinks", "noisy_copies")]
    classes = [set((np.asarray(p.by_query)[: int(p.count_by_query[0])] & 3).tolist()) for p in made]
    assert set.union(*classes) == {plan.EMPTY, plan.FULL, plan.EDGE, plan.MIXED}
    assert any({plan.FULL, plan.EDGE, plan.MIXED} <= c for c in classes)


@every_pair
def test_forward(case: Case, implementation) -> None:
    q, k, v, sinks = inputs(case)
    out, lse, _ = solved(case, implementation)
    expected, expected_lse = exact(case, q, k, v, sinks)
    assert out.dtype == v.dtype and lse.dtype == jnp.float32 and lse.shape == q.shape[:3]
    tolerance = TOLERANCES[case.dtype][0]
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=tolerance)


@every_pair
def test_gradients(case: Case, implementation) -> None:
    """Along random directions, central differences in float64; lse counts too where it is finite."""
    q, k, v, sinks = inputs(case)
    rng = np.random.default_rng(2)
    weight, lse_weight = weights(case)

    def exact_loss(*arrays):
        out, lse = exact(case, *arrays)
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
        ends = [exact_loss(*plain[:i], plain[i] + e * direction, *plain[i + 1 :], *fill) for e in (1e-4, -1e-4)]
        expected = (ends[0] - ends[1]) / 2e-4
        assert abs(np.sum(grad * direction) - expected) <= TOLERANCES[case.dtype][1] * max(1.0, np.abs(grad).max())


@every
def test_who_sees_nothing_gets_zeros_and_gives_no_gradient(implementation) -> None:
    case = next(c for c in CASES if c.name == "nothing")
    q, k, v, _ = inputs(case)
    blind = ~np.asarray(visible(case.visibility)).any(axis=-1)
    assert blind.sum() == 3 + 8
    seen = told(case, implementation)
    out, lse = attend(q, k, v, seen, implementation=implementation)
    assert (np.asarray(out)[blind] == 0).all() and (np.asarray(lse)[blind] == -np.inf).all()
    gq, gk, gv = jax.grad(
        lambda *a: jnp.sum(attend(*a, seen, implementation=implementation)[0] ** 2), argnums=(0, 1, 2)
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
    plain = attend(q, k, v, case.visibility, implementation=implementation)
    other = attend(
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
            lambda *a: jnp.sum(attend(*a, told(case, implementation), implementation=implementation)[0] ** 2),
            argnums=(0, 1, 2),
        )(*arrays)

    first, second = both(*arrays), both(*arrays)
    assert jax.tree.all(jax.tree.map(np.array_equal, first, second))


@every
def test_a_loss_that_has_no_number_where_nothing_is_seen_does_no_harm(implementation) -> None:
    """The gradient of lse is then no number for queries that have none, as of `where(isinf(lse), 0, lse**2)`."""
    case = next(c for c in CASES if c.name == "nothing")
    q, k, v, _ = inputs(case)
    seen = told(case, implementation)

    def loss(*arrays):
        out, lse = attend(*arrays, seen, implementation=implementation)
        return jnp.sum(out) + jnp.sum(jnp.where(jnp.isinf(lse), 0.0, lse * lse))

    if implementation != "reference":  # its own where has the same fault
        assert all(np.isfinite(g).all() for g in jax.grad(loss, argnums=(0, 1, 2))(q, k, v))


@every
def test_shapes_that_do_not_fit_are_told(implementation) -> None:
    q, k, v, _ = inputs(CASES[0])
    seen = CASES[0].visibility
    for wrong in ((q, k, v[:, :8]), (q, k[:1], v[:1]), (q[:, :0], k, v)):
        with pytest.raises(ValueError, match="do not fit together"):
            attend(*wrong, seen, implementation=implementation)
    with pytest.raises(ValueError, match=r"sinks \(3,\) for 4 query heads"):
        attend(q, k, v, seen, sinks=jnp.zeros(3), implementation=implementation)


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
    with pytest.raises(
        ValueError,
        match="unknown implementation 'fast'; there are 'reference' and 'xla' and 'pallas_tpu' and 'pallas_gpu'",
    ):
        api.attention(q, k, v, CASES[0].visibility, implementation="fast")  # pyright: ignore
    plain = CASES[0].visibility
    with pytest.raises(ValueError, match="'xla' has no dropout; set dropout to 0, or take 'reference'"):
        api.attention(q, k, v, plain, dropout=0.1, key=jax.random.key(0), implementation="xla")
    made = api.plan_for(plain, heads=4, kv_heads=2, head_dim=8, implementation="xla")
    with pytest.raises(ValueError, match="'xla' has no dropout"):
        api.attention(q, k, v, made, dropout=0.1, key=jax.random.key(0))
    with pytest.raises(ValueError, match="'reference' takes a Visibility and got a Plan"):
        api.attention(q, k, v, made, implementation="reference")
    with pytest.raises(ValueError, match="a plan of 1 x 16 queries and 16 keys for arrays of 2 x 16 and 16"):
        api.attention(q, k, v, api.plan_for(causal(1, 16), heads=4, kv_heads=2, head_dim=8, implementation="xla"))


def test_none_keeps_the_reference_for_few_pairs_one_query_and_dropout() -> None:
    def chosen(T: int, S: int, **options) -> str:
        seen = dataclasses.replace(causal(1, S), **{x: np.zeros((1, T), np.int32) for x in ("start", "stop", "island")})
        made = jax.eval_shape(lambda: api.plan_for(seen, heads=2, kv_heads=1, head_dim=8, **options))
        q, kv = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, T, 2, 8), (1, S, 1, 8)))
        key = jax.random.key(0) if options else None
        loop = "while" in str(jax.make_jaxpr(lambda q, kv: api.attention(q, kv, kv, seen, key=key, **options))(q, kv))
        assert loop == isinstance(made, plan.Plan)
        return "xla" if loop else "reference"

    assert chosen(1024, 1024) == chosen(1, 2**20 + 16) == chosen(1040, 1040, dropout=0.1) == "reference"
    assert chosen(1040, 1040) == chosen(2, 2**19 + 16) == "xla"


@pytest.mark.parametrize("length", [1, 16, 17, 300, 1024, 4097])
def test_chosen_blocks_leave_little_over(length: int) -> None:
    q_block, k_block = xla.blocks(length, length, 4)
    for block in (q_block, k_block, xla.blocks(length, length, 1).q):
        assert block % 16 == 0 and -length % block < 16 * -(-length // block) and (block >= 128 or length <= block)


def test_blocks_that_are_not_visited_are_not_read() -> None:
    """Keys and values that are no numbers do not matter to another document, neither forward nor backward."""
    seen = packed_causal(np.repeat(np.arange(4, dtype=np.int32), 16)[None])
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 64, 2, 8)), jnp.float32) for _ in range(3))
    k, v = (x.at[:, 16:32].set(jnp.nan) for x in (k, v))
    made = make(seen, plan.Blocks(16, 8))
    out, back = jax.vjp(lambda *a: api.attention(*a, made), q, k, v)
    others = np.r_[:16, 32:64]
    for x in (*out, *back(jax.tree.map(jnp.ones_like, out))):
        assert np.isfinite(x[:, others]).all() and np.isnan(x[:, 16:32]).any()


def test_memory_grows_with_the_length_and_not_its_square() -> None:
    def temporary(T: int) -> int:
        q, kv = jax.ShapeDtypeStruct((1, T, 4, 16), jnp.float32), jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32)
        made = make(causal(1, T), plan.Blocks(64, 64))
        grad = jax.grad(lambda q, k, v: jnp.sum(api.attention(q, k, v, made)[0]), argnums=(0, 1, 2))
        return jax.jit(grad).lower(q, kv, kv).compile().memory_analysis().temp_size_in_bytes

    assert temporary(4096) < 2.5 * temporary(2048) < 4 * 2048**2


def test_a_plan_made_once_serves_all_layers_and_recomputation() -> None:
    case = next(c for c in CASES if c.name == "documents_sinks")
    q, k, v, sinks = inputs(case)
    made = api.plan_for(case.visibility, heads=4, kv_heads=2, head_dim=8, implementation="xla")

    def loss(seen, q, k, v, sinks):
        layer = jax.checkpoint(lambda x, _: (x + api.attention(x, k, v, seen, sinks=sinks)[0], None))
        return jnp.sum(jax.lax.scan(layer, q, None, length=3)[0] ** 2)

    grad = jax.jit(jax.grad(loss, argnums=(1, 2, 3, 4)))
    expected, grads = (grad(seen, q, k, v, sinks) for seen in (case.visibility, made))
    for a, b in zip(expected, grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * float(jnp.abs(a).max()))


@pytest.mark.parametrize("split", ["rows and heads", "queries"])
def test_each_device_plans_its_own_part(split: str) -> None:
    """Rows and heads apart; then queries apart with all keys, whose gradients and the sinks' are sums over devices."""
    case = next(c for c in CASES if c.name == "documents")
    q, k, v, _ = inputs(case)
    sinks = jnp.arange(4.0)
    mesh = jax.make_mesh((2, 2), ("a", "b"), devices=jax.devices()[:4], axis_types=(AxisType.Auto,) * 2)
    rows, heads, queries = P("a"), P("a", None, "b"), P("a", "b")
    of_q, of_kv, of_sinks = (heads, heads, P("b")) if split == "rows and heads" else (queries, rows, P())
    of_t = rows if split == "rows and heads" else queries
    specs = Visibility(start=of_t, stop=of_t, island=of_t, index=rows, key_island=rows)

    def local(seen, q, k, v, sinks):
        own = api.plan_for(seen, heads=q.shape[2], kv_heads=k.shape[2], head_dim=64, implementation="xla")
        return api.attention(q, k, v, own, sinks=sinks)

    parts = jax.shard_map(local, mesh=mesh, in_specs=(specs, of_q, of_kv, of_kv, of_sinks), out_specs=(of_q, of_q))

    def grads(attend):
        def loss(*arrays):
            out, lse = attend(case.visibility, *arrays)
            return jnp.sum(out**2) + jnp.sum(jnp.sin(lse))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(q, k, v, sinks)

    whole = grads(lambda seen, q, k, v, sinks: api.attention(q, k, v, seen, sinks=sinks, implementation="reference"))
    for a, b in zip(whole, grads(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1.0, float(jnp.abs(a).max())))
