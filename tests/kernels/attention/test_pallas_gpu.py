"""What is special to attention on a GPU: that the kernels lower, who takes causal rows, and tiles within blocks."""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmgpt.core.stream import Visibility, packed_causal
from mmgpt.kernels.attention import api, cudnn, pallas_gpu, pallas_gpu_kernels, plan
from mmgpt.kernels.attention.cases import causal, documents
from mmgpt.kernels.attention.logits import Options
from mmgpt.kernels.attention.pallas_gpu_kernels import Launch, Static

KERNELS = ("attention_forward", "attention_backward_queries", "attention_backward_keys")
make = jax.jit(plan.make, static_argnums=1)


def two_documents(length: int) -> Visibility:
    return packed_causal(np.repeat(np.arange(2, dtype=np.int32), length // 2)[None])


def arrays(seen: Visibility, head_dim: int, dtype: str = "float32") -> list[jax.Array]:
    """`q, k, v` of 4 query heads over 2 key heads."""
    rng = np.random.default_rng(0)
    (B, T), S = seen.start.shape, seen.index.shape[1]
    sizes = (B, T, 4, head_dim), (B, S, 2, head_dim), (B, S, 2, head_dim)
    return [jnp.asarray(rng.standard_normal(size), dtype) for size in sizes]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_the_kernels_lower_for_a_gpu(head_dim: int, dtype: str) -> None:
    seen = two_documents(2048)  # so many that None takes the kernels

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        out, lse = api.attention(q, k, v, seen)
        return jnp.sum(out, dtype=jnp.float32) + jnp.sum(lse)

    chip = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=chip)  # JAX 0.12 lowers for a chip that it knows
    with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Triton in Pallas, by JAX 0.12
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*arrays(seen, head_dim, dtype))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @__gpu$xla.gpu.triton") == 3
    assert all(f'name = "{name}"' in text for name in KERNELS)


def loss_and_gradients(seen: Visibility | plan.Plan, weight: float, attend: Any) -> Any:
    """Of a sum of the outputs' squares and `weight` times a sum of lse's."""

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        out, lse = attend(q, k, v, seen)
        return jnp.sum(out**2) + weight * jnp.sum(jnp.sin(lse))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))


@pytest.mark.parametrize("lse_weight", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["causal", "packed"])
def test_cudnn_takes_what_is_causal(kind: str, lse_weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function in its place notes that it runs; there is no gradient of lse in it."""
    rows = causal(2, 48)
    seen = rows if kind == "causal" else documents(2)
    plain = functools.partial(api.attention, scale=0.25, implementation="reference")
    ran = []

    def attention(q, k, v, scale):
        jax.debug.callback(lambda: ran.append("forward"))
        return plain(q, k, v, causal(*q.shape[:2]))

    def gradients(q, k, v, do, scale):
        jax.debug.callback(lambda: ran.append("backward"))
        return jax.vjp(lambda q, k, v: plain(q, k, v, causal(*q.shape[:2]))[0], q, k, v)[1](do)

    monkeypatch.setattr(cudnn, "attention", attention)
    monkeypatch.setattr(cudnn, "gradients", gradients)
    way = pallas_gpu._Way(Static(0.25, Options(soft_cap=None), interpret=True), causal=True)
    made = make(seen, plan.Blocks(32, 16))
    qkv = arrays(seen, 16)
    ours = loss_and_gradients(
        made, lse_weight, lambda q, k, v, seen: pallas_gpu._attention(way, q, k, v, None, seen, None)
    )
    value, grads = ours(*qkv)
    expected, expected_grads = loss_and_gradients(seen, lse_weight, plain)(*qkv)
    jax.effects_barrier()
    both = ["forward", "backward"] if lse_weight == 0.0 else ["forward"]
    assert ran == (both if kind == "causal" else [])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for a, b in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * float(jnp.abs(b).max()))


def test_cudnn_fits_what_it_can_express() -> None:
    def fits(dtype: str = "bfloat16", T: int = 64, K: int = 64, **options) -> bool:
        of: Any = [jax.ShapeDtypeStruct((1, length, n, K), jnp.dtype(dtype)) for length, n in ((T, 4), (64, 2))]
        return cudnn.fits(of[0], of[1], options.get("soft_cap"), options.get("sinks"))

    assert fits() and fits("float16") and fits(K=80) and fits(K=128)
    assert not any((fits("float32"), fits(T=32), fits(K=136), fits(K=100), fits(soft_cap=30.0), fits(sinks=np.ones(4))))


def test_tiles_within_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of the plan that several tiles of both sides make up."""
    seen = documents(1)
    table = {256: Launch(4, 1, 32, 16)}
    for name in ("FORWARD", "QUERIES", "KEYS"):
        monkeypatch.setattr(pallas_gpu_kernels, name, table)
    qkv = arrays(seen, 16, "bfloat16")
    attend = functools.partial(api.attention, implementation="pallas_gpu", interpret=True)
    ours = loss_and_gradients(make(seen, plan.Blocks(64, 64)), 1.0, attend)(*qkv)
    plain = loss_and_gradients(seen, 1.0, functools.partial(api.attention, implementation="reference"))
    value, grads = plain(*(x.astype(jnp.float32) for x in qkv))
    np.testing.assert_allclose(ours[0], value, rtol=1e-2)
    for a, b in zip(ours[1], grads, strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0, atol=2e-2 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("bound", [30.0, 1e9, "array"])
def test_a_bound_on_logits_changes_nothing(bound: float | str) -> None:
    seen = documents(1)
    qkv = arrays(seen, 16)
    given: Any = jnp.float32(30.0) if bound == "array" else bound
    attend = functools.partial(api.attention, implementation="pallas_gpu", interpret=True)
    made = make(seen, plan.Blocks(32, 32))
    plain, grads = loss_and_gradients(made, 1.0, attend)(*qkv)
    bounded = loss_and_gradients(made, 1.0, functools.partial(attend, logit_bound=given))(*qkv)
    np.testing.assert_allclose(plain, bounded[0], rtol=1e-6)
    for a, b in zip(grads, bounded[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(a).max()))


def test_a_sink_of_nothing_is_none() -> None:
    seen = two_documents(64)
    qkv = arrays(seen, 16)
    sinks = jnp.full((4,), -jnp.inf)
    attend = functools.partial(api.attention, *qkv, make(seen, plan.Blocks(16, 16)), implementation="pallas_gpu")
    for a, b in zip(attend(interpret=True), attend(interpret=True, sinks=sinks), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_blocks_and_what_does_not_fit_is_told() -> None:
    assert pallas_gpu.blocks(4096, 4096, 128) == (128, 64) and pallas_gpu.blocks(4096, 4096, 256) == (64, 64)
    assert pallas_gpu.blocks(40, 5, 64) == (64, 16)
    seen = two_documents(64)
    q, k, v = arrays(seen, 16)
    with pytest.raises(ValueError, match="'pallas_gpu' has blocks of powers of 2 from 16 on and got Blocks"):
        api.attention(q, k, v, make(seen, plan.Blocks(8, 16)), implementation="pallas_gpu")
    q, k, v = arrays(seen, 264)
    with pytest.raises(ValueError, match="'pallas_gpu' has head dims up to 256 and got 264; take 'xla'"):
        api.attention(q, k, v, seen, implementation="pallas_gpu")
    chip = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=chip)):
        assert api.chosen((2048, 2048), 4, 2, 256, None, False) == "pallas_gpu"
        assert api.chosen((2048, 2048), 4, 2, 264, None, False) == "xla"
