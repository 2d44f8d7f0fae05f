"""Cross-entropy by chunks beside the specification and float64: values and gradients, whatever the mesh."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmgpt.dist import axes as rules
from mmgpt.dist.mesh import Mesh
from mmgpt.kernels.cross_entropy.api import cross_entropy

B, T, D, V, USED = 8, 6, 16, 32, 27
MESHES = {
    "one": Mesh.Config(),
    "fsdp": Mesh.Config(fsdp=8),
    "replicas": Mesh.Config(replica=2, fsdp=4),
    "tensor": Mesh.Config(fsdp=2, tensor=4),
    "all": Mesh.Config(fsdp=2, context=2, tensor=2),
}
CHUNKS = {"one chunk": 1 << 20, "chunks of 8": 1}


def drawn(dtype: Any = np.float32) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((B, T, D)), rng.standard_normal((D, V))
    target, weight = rng.integers(0, USED, (B, T)), rng.random((B, T)) * (rng.random((B, T)) < 0.8)
    return x.astype(np.float32).astype(dtype), w.astype(np.float32), target.astype(np.int32), weight.astype(np.float32)


def by_float64(x: np.ndarray, w: np.ndarray, target: np.ndarray, weight: np.ndarray, z_loss: float) -> dict[str, Any]:
    x, w, weight = (np.asarray(a, np.float64) for a in (x, w, weight))
    logits = (x @ w)[..., :USED]
    log_z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    picked = np.take_along_axis(logits, target[..., None], -1)[..., 0]
    p = np.exp(logits - log_z[..., None])
    moved = np.zeros((B, T, V))
    moved[..., :USED] = (weight * (1 + 2 * z_loss * log_z))[..., None] * p
    moved -= weight[..., None] * np.eye(V)[target]
    return {
        "total": (weight * (log_z - picked + z_loss * log_z**2)).sum(),
        "cross_entropy": log_z - picked,
        "log_z": log_z,
        "right": logits.argmax(-1) == target,
        "dx": moved @ w.T,
        "dw": np.einsum("btd,btv->dv", x, moved),
    }


def found(arrays: tuple[np.ndarray, ...], mesh: Mesh.Config, rows: bool, **options: Any) -> dict[str, Any]:
    x, w, target, weight = arrays
    config, names = mesh, "vocab embed" if rows else "embed vocab"
    with jax.set_mesh(config.build(jax.devices()[:1] if mesh is MESHES["one"] else None)):
        w = np.ascontiguousarray(w.T) if rows else w

        def put(a: np.ndarray, spec: Any) -> jax.Array:
            return jax.device_put(a, jax.NamedSharding(jax.sharding.get_mesh(), spec))

        args = [put(x, rules.spec("batch seq embed", rules.ACT)), put(w, rules.stored(names, w.shape))]
        args += [put(a, rules.spec("batch seq", rules.ACT)) for a in (target, weight)]

        @jax.jit
        def both(x: jax.Array, w: jax.Array, target: jax.Array, weight: jax.Array) -> Any:
            def total(x: jax.Array, w: jax.Array) -> Any:
                total, scores = cross_entropy(x, w, target, weight, used=USED, rows=rows, **options)
                return 3.0 * total, (total, scores)  # another system's factor comes back with the gradient

            return jax.grad(total, argnums=(0, 1), has_aux=True)(x, w)

        (dx, dw), (total, scores) = both(*args)
        alone, _ = jax.jit(lambda *a: cross_entropy(*a, used=USED, rows=rows, **options))(*args)
        assert float(alone) == float(total)  # without gradients too
        assert dw.sharding.spec == args[1].sharding.spec and dw.dtype == jnp.float32
        return {
            "total": total,
            **scores._asdict(),
            "dx": np.asarray(dx, np.float64) / 3,
            "dw": np.asarray(dw, np.float64).T / 3 if rows else np.asarray(dw, np.float64) / 3,
        }


@pytest.mark.parametrize("rows", [False, True], ids=["columns", "rows"])
@pytest.mark.parametrize("chunk_bytes", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_values_and_gradients_are_those_of_float64(mesh: Mesh.Config, chunk_bytes: int, rows: bool) -> None:
    arrays = drawn()
    expected = by_float64(*arrays, z_loss=0.05)
    ours = found(arrays, mesh, rows, z_loss=0.05, chunk_bytes=chunk_bytes)
    for name, value in expected.items():
        np.testing.assert_allclose(np.asarray(ours[name]), value, rtol=1e-5, atol=1e-5, err_msg=name)


def test_the_specification_is_that_too() -> None:
    arrays = drawn()
    expected = by_float64(*arrays, z_loss=0.05)
    ours = found(arrays, MESHES["one"], False, z_loss=0.05, implementation="reference")
    for name, value in expected.items():
        np.testing.assert_allclose(np.asarray(ours[name]), value, rtol=1e-5, atol=1e-5, err_msg=name)


def test_products_are_of_the_activations_type_and_sums_of_float32() -> None:
    arrays = drawn(jnp.bfloat16)
    expected = by_float64(arrays[0].astype(np.float32), *arrays[1:], z_loss=0.0)
    ours = found(arrays, MESHES["fsdp"], False)
    np.testing.assert_allclose(np.asarray(ours["cross_entropy"]), expected["cross_entropy"], atol=0.05)
    for name in ("dx", "dw"):
        np.testing.assert_allclose(ours[name], expected[name], atol=0.03)


@pytest.fixture
def one_device() -> Iterator[None]:
    with jax.set_mesh(Mesh.Config().build(jax.devices()[:1])):
        yield


def test_three_products_are_made_and_no_fourth(one_device: None) -> None:
    x, w, target, weight = drawn()
    grads = jax.make_jaxpr(
        jax.grad(lambda x, w: cross_entropy(x, w, target, weight, used=USED, chunk_bytes=1)[0], argnums=(0, 1))
    )(x, w)
    text = str(grads)
    assert text.count("dot_general[") == 3 and "length=6" in text  # of a chunk, in a loop over 48 positions


def test_shapes_that_do_not_fit_are_told(one_device: None) -> None:
    x, w, target, weight = drawn()
    with pytest.raises(ValueError, match=r"x \(8, 6, 16\), w \(32, 16\) \(columns are ids\).*expected x \[B, T, D\]"):
        cross_entropy(x, w.T, target, weight, used=USED)
    with pytest.raises(ValueError, match="33 ids in use"):
        cross_entropy(x, w, target, weight, used=33)
