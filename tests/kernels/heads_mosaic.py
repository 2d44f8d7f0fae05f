"""Compiles the kernel of heads, with attention behind it, for a TPU that is not there, in a process of its own:
`python -m tests.kernels.heads_mosaic TARGET`, which prints each shape and, if all went well, "compiled"."""

import os
import sys
from typing import Any

import jax
import jax.numpy as jnp

from mmgpt.core.stream import Visibility
from mmgpt.kernels import heads
from mmgpt.kernels.attention import api
from mmgpt.kernels.attention.logits import LOG2E
from mmgpt.plan import hlo
from tests.kernels.attention.mosaic import topology

SHAPES = (
    # rows, positions, heads, kv_heads, head_dim, dtype, normed
    (2, 2048, 32, 8, 128, "bfloat16", True),
    (1, 4096, 64, 8, 128, "bfloat16", False),
    (2, 1000, 4, 1, 128, "float32", True),
    (1, 2048, 16, 8, 256, "bfloat16", True),
)


def program(shape: tuple[Any, ...], mesh: jax.sharding.Mesh) -> str:
    """The scheduled program of both kernels and attention's, forward and backward."""
    B, T, H, G, K, dtype, normed = shape

    def of(dtype: Any, *sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=jax.NamedSharding(mesh, jax.P()))

    place = of(jnp.int32, B, T)
    seen = Visibility(start=place, stop=place, island=place, index=place, key_island=place)
    numbers = jnp.dtype(dtype)
    arrays = of(numbers, B, T, H * K), of(numbers, B, T, G * K), of(numbers, B, T, G, K), of(jnp.float32, K)

    def loss(q: Any, k: Any, v: Any, gain: Any, by: Any, seen: Visibility) -> jax.Array:
        q, k = (heads.turned(x, by, gain if normed else None, head_dim=K, epsilon=1e-5) for x in (q, k))
        out, _ = api.attention(q, k, v, seen, scale=1.0 / LOG2E, implementation="pallas_tpu")
        return jnp.sum(out * jnp.arange(K, dtype=out.dtype), dtype=jnp.float32)

    with jax.set_mesh(mesh):
        grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))
        traced = grad.trace(*arrays, of(jnp.float32, B, T, K), seen)
        return traced.lower(lowering_platforms=("tpu",)).compile().as_text() or ""


def copied(text: str, size: int) -> list[str]:
    """What stands between the kernel of heads and attention's forward kernel and works on `size` bytes or more."""
    found = hlo.parse(text)
    entry = found.computations[found.entry]
    attention = next(i for i in entry.values() if i.opcode == "custom-call" and "attention_forward" in i.name)
    between = []
    for name in attention.operands:
        while entry[name].opcode in ("bitcast", "get-tuple-element", "copy-start", "copy-done"):  # to VMEM, ahead
            name = entry[name].operands[0]
        maker = entry[name]
        if hlo.size(maker.type) >= size and "heads_forward" not in maker.name:
            between.append(maker.name)
    return between


if __name__ == "__main__":
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    chips = topology(sys.argv[1]).devices[:1]
    auto = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=chips)
    for shape in SHAPES:
        text = program(shape, auto)
        B, T, H, _, K, _, _ = shape
        # Values are turned round by XLA; queries and keys go from kernel to kernel, if no positions need filling up.
        between = copied(text, 1 << 20)
        assert len(between) <= (1 if T % 1024 == 0 else 3), f"{shape}: {between}"
        assert text.count("heads_forward") >= 2 and text.count("heads_backward") >= 2, shape
        print(shape, flush=True)
    print("compiled")
