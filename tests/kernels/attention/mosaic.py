"""Compiles attention for a TPU that is not there, in a process of its own: `python -m tests.kernels.attention.mosaic
TARGET`, which prints what failed. libtpu lets one process of a machine compile at a time."""

import dataclasses
import os
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from mmgpt.core.stream import Visibility
from mmgpt.kernels.attention import api

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Of one device's arrays, and options."""

    name: str
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    rows: int = 1
    dtype: str = "bfloat16"
    soft_cap: float | None = None
    sinks: bool = False
    bound: float | None = None


SHAPES = (
    Shape(name="emu3_0_1b", queries=2048, keys=2048, heads=6, kv_heads=2, head_dim=128, rows=4),
    Shape(name="emu3_1b", queries=5120, keys=5120, heads=16, kv_heads=8, head_dim=128, bound=30.0),
    Shape(name="emu3_8b", queries=5120, keys=5120, heads=32, kv_heads=8, head_dim=128),
    Shape(name="emu3_5", queries=16_384, keys=32_768, heads=8, kv_heads=1, head_dim=128, bound=30.0),
    Shape(name="llama3_405b", queries=8192, keys=8192, heads=64, kv_heads=4, head_dim=128),
    Shape(name="digits", queries=104, keys=104, heads=4, kv_heads=2, head_dim=32, rows=20, dtype="float32"),
    Shape(name="shapes", queries=136, keys=136, heads=4, kv_heads=2, head_dim=48, rows=4, dtype="float32"),
    Shape(name="head dim 64", queries=2048, keys=2048, heads=4, kv_heads=4, head_dim=64, rows=2, soft_cap=30.0),
    Shape(name="head dim 80", queries=1000, keys=1500, heads=6, kv_heads=2, head_dim=80, sinks=True),
    Shape(name="head dim 96", queries=1024, keys=1024, heads=8, kv_heads=1, head_dim=96),
    Shape(name="head dim 256", queries=16_384, keys=16_384, heads=16, kv_heads=8, head_dim=256, bound=30.0),
)
"""A block of every shipped config, and every head dim that the kernels promise."""


def compiled(shape: Shape, mesh: jax.sharding.Mesh, implementation: Any = "pallas_tpu", platform: str = "tpu") -> None:
    """The forward and the backward kernel, with the plan."""

    def of(dtype: Any, *sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=jax.NamedSharding(mesh, jax.P()))

    query, key = of(jnp.int32, shape.rows, shape.queries), of(jnp.int32, shape.rows, shape.keys)
    seen = Visibility(start=query, stop=query, island=query, index=key, key_island=key)
    q, k, v = (
        of(jnp.dtype(shape.dtype), shape.rows, length, heads, shape.head_dim)
        for length, heads in (
            (shape.queries, shape.heads),
            (shape.keys, shape.kv_heads),
            (shape.keys, shape.kv_heads),
        )
    )
    sinks = of(jnp.float32, shape.heads) if shape.sinks else None

    def loss(q: Any, k: Any, v: Any, sinks: Any, seen: Visibility) -> jax.Array:
        out, lse = api.attention(
            *(q, k, v, seen),
            soft_cap=shape.soft_cap,
            sinks=sinks,
            logit_bound=shape.bound,
            implementation=implementation,
        )
        return jnp.sum(out, dtype=jnp.float32) + jnp.sum(lse)

    with jax.set_mesh(mesh):
        grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
        grad.trace(q, k, v, sinks, seen).lower(lowering_platforms=(platform,)).compile()


def ring(chips: list[Any]) -> str:
    """The scheduled program of a ring of four chips, forward and backward."""
    mesh = jax.make_mesh((4,), ("context",), axis_types=(jax.sharding.AxisType.Auto,), devices=chips)
    part, whole = jax.P(None, "context"), jax.P()

    def of(dtype: Any, spec: jax.P, *sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=jax.NamedSharding(mesh, spec))

    query, key = of(jnp.int32, part, 1, 32_768), of(jnp.int32, whole, 1, 32_768)
    seen = Visibility(start=query, stop=query, island=query, index=key, key_island=key)
    specs = Visibility(start=part, stop=part, island=part, index=whole, key_island=whole)
    q, k, v = (of(jnp.bfloat16, part, 1, 32_768, heads, 128) for heads in (8, 2, 2))

    def local(seen: Visibility, q: Any, k: Any, v: Any) -> jax.Array:
        plans = api.plan_for(
            seen, heads=8, kv_heads=2, head_dim=128, implementation="pallas_tpu", unit=1024, ring="context"
        )
        return api.attention(q, k, v, plans, logit_bound=30.0, implementation="pallas_tpu")[0]

    def loss(q: Any, k: Any, v: Any, seen: Visibility) -> jax.Array:
        split = jax.shard_map(local, mesh=mesh, in_specs=(specs, part, part, part), out_specs=part, check_vma=False)
        return jnp.sum(split(seen, q, k, v), dtype=jnp.float32)

    with jax.set_mesh(mesh):
        grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
        return grad.trace(q, k, v, seen).lower(lowering_platforms=("tpu",)).compile().as_text()


def overlapped(program: str) -> list[tuple[int, int]]:
    """Of each loop in which keys go round: arrays under way while the step's work is done, and others."""
    found = []
    for body in program.split("\n}\n"):
        lines = body.splitlines()
        work = [i for i, line in enumerate(lines) if " conditional(" in line]
        begun = [i for i, line in enumerate(lines) if " collective-permute-start(" in line]
        arrived = [i for i, line in enumerate(lines) if " collective-permute-done(" in line]
        if work and begun:
            under_way = sum(i < work[-1] for i in begun)
            found.append((min(under_way, sum(i > work[-1] for i in arrived)), len(begun)))
    return found


def topology(target: str) -> Any:
    """The chips of `target`, once no other process compiles."""
    from jax.experimental import topologies

    for _ in range(300):
        try:
            return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[target])
        except jax.errors.JaxRuntimeError as e:
            if "lockfile" not in str(e) and "in use" not in str(e) and "ABORTED" not in str(e):
                raise
            time.sleep(2.0)
    raise TimeoutError("another process has held the TPU compiler for ten minutes")


if __name__ == "__main__":
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    chips = topology(sys.argv[1]).devices[:1]
    auto = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=chips)
    for shape in SHAPES:
        begin = time.monotonic()
        try:
            compiled(shape, auto)
            print(f"{shape.name}: compiled in {time.monotonic() - begin:.1f} s", flush=True)
        except Exception as e:
            print(f"{shape.name}: FAILED {e}", flush=True)
    if sys.argv[1] == "v5p":
        print(f"ring: {overlapped(ring(topology('v5p').devices[:4]))}")
