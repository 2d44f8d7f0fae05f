"""The kernel that norms, turns and lays out heads: against float64, and a decoder with it against one without."""

import contextlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu

from mmgpt.dist.mesh import Mesh
from mmgpt.kernels import heads
from mmgpt.kernels.attention import api, pallas_tpu
from mmgpt.nn import attention
from mmgpt.nn.layers import RMSNorm, Turn, rotary
from tests.kernels.attention.mosaic import TOPOLOGIES
from tests.nn import test_attention as layer

EPSILON, FACTOR = 1e-5, 0.3
CASES = {
    "normed": (1, 128, 4, 128, True),
    "uneven": (2, 300, 2, 128, True),
    "one key head, not normed": (2, 100, 1, 128, False),
    "wide": (1, 40, 3, 256, True),
    "several groups of heads": (1, 130, 40, 128, True),
}
"""Rows, positions, heads, numbers of a head, whether they are normed."""


def draw(case: str) -> dict[str, np.ndarray]:
    B, T, H, K, _ = CASES[case]
    rng = np.random.default_rng(0)
    angle = rng.uniform(-3, 3, (B, T, K // 2))
    return {
        "x": rng.standard_normal((B, T, H * K)) * 2,
        "by": np.concatenate([np.cos(angle), np.sin(angle)], axis=-1),
        "gain": rng.uniform(-2, 2, K),
        "weight": rng.standard_normal((B, T, H, K)),
    }


def exact(case: str, x: np.ndarray, by: np.ndarray, gain: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, ...]:
    """Heads, and the gradients of their weighted sum by x and gain, by the formulas (halves convention)."""
    B, T, H, K, normed = CASES[case]
    x = x.reshape(B, T, H, K)
    inverse = 1 / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + EPSILON)
    n = x * inverse * gain if normed else x
    cos, sin = (np.tile(part, 2)[:, :, None] * FACTOR for part in np.split(by, 2, axis=-1))

    def rotated(y: np.ndarray) -> np.ndarray:
        return np.concatenate([-y[..., K // 2 :], y[..., : K // 2]], axis=-1)

    dn = weight * cos - rotated(weight * sin)
    if not normed:
        return n * cos + rotated(n) * sin, dn.reshape(B, T, -1), np.zeros(K)
    dy = dn * gain
    dx = inverse * (dy - x * inverse * np.mean(dy * x * inverse, axis=-1, keepdims=True))
    return n * cos + rotated(n) * sin, dx.reshape(B, T, -1), np.sum(dn * x * inverse, axis=(0, 1, 2))


def solved(case: str, dtype: Any, arrays: dict[str, np.ndarray], *, present: bool = False) -> Any:
    """The same by the kernel, or by the layers that other devices take."""
    K, normed = CASES[case][3:]
    by, weight = (jnp.asarray(arrays[name], jnp.float32) for name in ("by", "weight"))

    def by_layers(x: jax.Array, gain: jax.Array) -> jax.Array:
        x = x.reshape(*x.shape[:2], -1, K)
        norm = RMSNorm(nnx.Rngs(0), K, EPSILON)
        norm.scale[...] = gain
        return (rotary(norm(x) if normed else x, Turn(by)) * jnp.float32(FACTOR)).astype(x.dtype)

    def by_kernel(x: jax.Array, gain: jax.Array) -> jax.Array:
        options = {"head_dim": K, "factor": FACTOR, "epsilon": EPSILON, "interpret": True}
        return heads.turned(x, by, gain if normed else None, **options)

    def loss(x: jax.Array, gain: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = (by_layers if present else by_kernel)(x, gain)
        return jnp.sum(out * weight, dtype=jnp.float32), out

    x, gain = jnp.asarray(arrays["x"], dtype), jnp.asarray(arrays["gain"], jnp.float32)
    with jax.set_mesh(Mesh.Config().build(jax.devices()[:1])) if present else contextlib.nullcontext():
        (dx, dgain), out = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(x, gain)
    assert (out.dtype, dx.dtype, dgain.dtype) == (dtype, dtype, jnp.float32)
    return tuple(np.asarray(y, np.float64) for y in (out, dx, dgain))


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / max(1.0, np.abs(wanted).max()))


@pytest.mark.parametrize("case", CASES)
def test_float32_heads_are_those_of_the_formulas(case: str) -> None:
    arrays = {name: x.astype(np.float32).astype(np.float64) for name, x in draw(case).items()}
    for found, wanted in zip(solved(case, jnp.float32, arrays), exact(case, **arrays), strict=True):
        assert found.shape == wanted.shape
        assert error(found, wanted) < 2e-6


@pytest.mark.parametrize("case", ["uneven", "one key head, not normed", "wide"])
def test_bfloat16_heads_are_nearer_to_the_formulas_than_the_layers_are(case: str) -> None:
    """One rounding, where the layers round after the norm, after the turn, and after the factor."""
    arrays = draw(case)
    arrays |= {name: np.asarray(jnp.asarray(arrays[name], jnp.bfloat16), np.float64) for name in ("x", "weight")}
    wanted = exact(case, **arrays)
    found, before = (solved(case, jnp.bfloat16, arrays, present=present) for present in (False, True))
    for mine, layers, true in zip(found, before, wanted, strict=True):
        assert error(mine, true) < 4e-3
        assert np.sqrt(np.mean((mine - true) ** 2)) <= 1.05 * np.sqrt(np.mean((layers - true) ** 2))


def test_only_heads_of_whole_registers_on_a_tpu_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not heads.served(128)  # no TPU here
    monkeypatch.setattr(heads, "platform", lambda: "tpu")
    assert [size for size in (64, 80, 96, 128, 192, 256) if heads.served(size)] == [128, 256]


@pytest.mark.parametrize(
    ("mesh", "context", "qk_norm"),
    [(0, "gather", "rms"), (0, "gather", "none"), (0, "gather", "layer"), (1, "gather", "rms"), (1, "ring", "rms")],
    ids=["one", "not normed", "layer norm", "all axes", "all axes, ring"],
)
def test_a_decoder_on_a_tpu_is_the_decoder_elsewhere(
    mesh: int, context: Any, qk_norm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels of a TPU interpreted: logits and all gradients of two layers in float32.

    On several devices attention's own is left out: its interpreter waits for threads that two cores may not have.
    """
    config = layer.CONFIG.replace(head_dim=128, qk_norm=qk_norm)
    monkeypatch.setattr(layer, "CONFIG", config)
    length = 256
    expected, expected_grads = layer.solved(Mesh.Config(fsdp=1), length)
    used = []

    def turned(*arrays: Any, **options: Any) -> jax.Array:
        used.append(options["factor"])
        return heads.turned(*arrays, **options, interpret=True)

    monkeypatch.setattr(attention, "served", lambda head_dim: head_dim == 128)
    monkeypatch.setattr(attention, "turned", turned)
    monkeypatch.setattr(api, "DENSE_PAIRS", 0)
    if mesh == 0:
        kernel, interpret = pallas_tpu.attention, pltpu.InterpretParams()
        monkeypatch.setattr(api, "_sparse", lambda head_dim: "pallas_tpu")
        monkeypatch.setattr(pallas_tpu, "attention", lambda *a, **k: kernel(*a, **k | {"interpret": interpret}))
    logits, grads = layer.solved(layer.MESHES[mesh], length, context)
    assert len(set(used)) == (0 if qk_norm == "layer" else 2)  # queries' factor and keys'
    real = layer.batch().visibility["tokens"].key_island >= 0
    np.testing.assert_allclose(logits[real], expected[real], rtol=0, atol=2e-5)
    for grad, other in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, other, rtol=0, atol=2e-4 * max(1.0, np.abs(other).max()))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, which is for Python 3.11 here")
@pytest.mark.parametrize("target", TOPOLOGIES)
def test_the_kernels_compile_and_nothing_is_copied(target: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.heads_mosaic", target],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=850,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "compiled", done.stdout[-4000:]
