"""Memory of the loss at the size of Emu3's vocabulary, by a TPU's compiler."""

import jax
import jax.numpy as jnp
import pytest

from mmgpt.dist import axes as rules
from mmgpt.dist.mesh import Mesh
from mmgpt.kernels.cross_entropy import xla
from mmgpt.kernels.cross_entropy.api import CHUNK_BYTES
from mmgpt.plan.chips import devices

pytest.importorskip("libtpu", reason="compiles for TPUs: pip install libtpu")
T, D, V = 8192, 4096, 184_832


def test_beside_its_results_the_loss_takes_a_chunk_of_logits() -> None:
    """The weight comes in the activations' type: where it is float32, its copy of that type is 1.5 GB more."""
    with jax.set_mesh(Mesh.Config().build(devices("v5p:2x2x1")[:1])):
        static = xla._Static(V, 0.0, False, CHUNK_BYTES)

        def shaped(shape: tuple[int, ...], dtype: jnp.dtype, axes: str) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=rules.sharding(axes, rules.ACT))

        arguments = (
            shaped((1, T, D), jnp.bfloat16, "batch seq embed"),
            shaped((D, V), jnp.bfloat16, "embed vocab"),
            shaped((1, T), jnp.int32, "batch seq"),
            shaped((1, T), jnp.float32, "batch seq"),
        )
        call = jax.jit(lambda *a: xla._on_each_device(static, *a, gradients=True))
        memory = call.lower(*arguments).compile().memory_analysis()
    assert memory is not None
    results = 4 * D * V + 2 * T * D
    assert memory.output_size_in_bytes == pytest.approx(results, rel=0.01)
    assert memory.temp_size_in_bytes <= 0.4e9
