"""Keys that go round a ring of devices, against the specification over the whole row."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from mmgpt.core.stream import Visibility, packed_causal
from mmgpt.kernels.attention import api, xla
from mmgpt.kernels.attention.cases import CASES, TOLERANCES, Case, causal

DEVICES = 4
CONTEXT = 64
AXIS = "context"


def cut(case: Case) -> Case:
    """The case's rows padded to a length that divides."""
    seen = case.visibility
    spare = -seen.start.shape[1] % CONTEXT
    if spare == 0:
        return case
    fill = {"start": 0, "stop": 0, "island": 0, "key_island": -1}
    parts = {n: np.pad(getattr(seen, n), ((0, 0), (0, spare)), constant_values=value) for n, value in fill.items()}
    index = np.broadcast_to(np.arange(seen.start.shape[1] + spare, dtype=np.int32), parts["start"].shape)
    return dataclasses.replace(case, visibility=Visibility(index=np.ascontiguousarray(index), **parts))


ROWS = [cut(c) for c in CASES if c.visibility.start.shape == c.visibility.index.shape and c.name != "one_token"]


def loss(attend, q, k, v, sinks):
    out, lse = attend(q, k, v, sinks)
    weight = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
    found = jnp.sum(out * weight, dtype=jnp.float32)
    return found + jnp.sum(jnp.sin(jnp.where(jnp.isfinite(lse), lse, 0.0))), (out, lse)


def round_the_ring(case: Case, devices: int, implementation, **options):
    """`attend(q, k, v, sinks)` over `devices`."""
    mesh = jax.make_mesh((devices,), (AXIS,), devices=jax.devices()[:devices], axis_types=(AxisType.Auto,))
    part, whole = P(None, AXIS), P()
    specs = Visibility(start=part, stop=part, island=part, index=whole, key_island=whole)

    def local(seen, q, k, v, sinks):
        sizes = {"heads": case.heads, "kv_heads": case.kv_heads, "head_dim": case.head_dim}
        ring = api.plan_for(seen, **sizes, implementation=implementation, ring=AXIS)
        given = {"scale": case.scale, "soft_cap": case.soft_cap, "sinks": sinks, **options}
        return api.attention(q, k, v, ring, implementation=implementation, **given)

    split = jax.shard_map(
        local, mesh=mesh, in_specs=(specs, part, part, part, whole), out_specs=(part, part), check_vma=False
    )
    return functools.partial(split, case.visibility)


def inputs(case: Case):
    q, k, v, sinks = case.arrays()
    q, k, v = (jnp.asarray(x, case.dtype) for x in (q, k, v))
    return q, k, v, None if sinks is None else jnp.asarray(sinks)


def check(case: Case, attend) -> None:
    arrays = inputs(case)
    at = tuple(i for i, x in enumerate(arrays) if x is not None)

    def plain(q, k, v, sinks):
        options = {"scale": case.scale, "soft_cap": case.soft_cap, "sinks": sinks}
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        return api.attention(q, k, v, case.visibility, implementation="reference", **options)

    solved = [jax.jit(jax.grad(functools.partial(loss, f), argnums=at, has_aux=True))(*arrays) for f in (plain, attend)]
    (expected, (out, lse)), (grads, (own, own_lse)) = solved
    close, gradient = TOLERANCES[case.dtype]
    np.testing.assert_allclose(np.asarray(own, np.float32), out, rtol=0, atol=close)
    np.testing.assert_allclose(own_lse, lse, rtol=0, atol=close)
    for a, b in zip(expected, grads, strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(b, a, rtol=0, atol=gradient * max(1.0, np.abs(a).max()))


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.name)
def test_a_ring_is_the_specification(case: Case) -> None:
    check(case, round_the_ring(case, DEVICES, "xla"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["documents", "documents_sinks"])
def test_the_kernels_of_a_gpu_go_round_too(name: str) -> None:
    case = next(c for c in ROWS if c.name == name)
    check(case, round_the_ring(case, 2, "pallas_gpu", interpret=True))


@pytest.mark.slow
@pytest.mark.parametrize("bound", [10.0, 100.0])
def test_the_kernels_of_a_tpu_go_round_too(bound: float) -> None:
    """Interpreted kernels wait for those of all devices, so every step must have some of them to do on each."""
    whole = causal(1, 256)
    whole = dataclasses.replace(whole, stop=np.full_like(whole.stop, 256))
    case = Case(name="whole", visibility=whole, heads=2, kv_heads=1, head_dim=64, sinks=True)
    options = {"interpret": pltpu.InterpretParams(), "logit_bound": jnp.float32(bound)}
    check(case, round_the_ring(case, 2, "pallas_tpu", **options))


def test_steps_that_see_nothing_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents end where a device's part ends: each device works in one step of the ring, forward and backward."""
    T = 64 * DEVICES
    place = np.arange(T, dtype=np.int32)[None].repeat(2, 0)
    case = Case(name="apart", visibility=packed_causal(place // 64), head_dim=64)
    worked = {"_forward": 0, "_backward": 0}

    def counted(name: str, function):
        def count() -> None:
            worked[name] += 1

        def call(*arguments):
            jax.debug.callback(count)
            return function(*arguments)

        return call

    for name in worked:
        monkeypatch.setattr(xla, name, counted(name, getattr(xla, name)))
    check(case, round_the_ring(case, DEVICES, "xla"))
    jax.effects_barrier()
    assert worked == {"_forward": DEVICES, "_backward": DEVICES}
