"""Measured time of attention: on the accelerator that is there, or on CPUs our two implementations for any device."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmgpt.core.config import ConfigError
from mmgpt.core.log import console
from mmgpt.core.stream import packed_causal
from mmgpt.evaluate import bench_attention_peers
from mmgpt.evaluate.bench_attention_peers import Case
from mmgpt.kernels.attention import api
from mmgpt.kernels.attention import plan as plans
from mmgpt.plan.attention import MIXES, documents, visible_pairs

CPU_MIXES = {"4k: 1-2k": (4096, "1-2k"), "16k: 4.1k": (16_384, "4.1k")}
CPU_HEADS = (2, 1, 64)
"""Query heads, key heads and head dim on CPUs, where the reference needs 4 GB for 16k tokens of two heads."""

DENSE_PEAK = {"H100": 989.0, "H200": 989.0}
"""TFLOP/s of bfloat16 matmuls without sparsity, by what is in the name of the device."""

Call = Callable[..., jax.Array]


def timed(
    *, heads: int, kv_heads: int, head_dim: int, block: int | None, bound: float | None = None, turns: int = 5
) -> dict[str, dict[str, Any]]:
    """Seconds of the forward pass and of it with the backward pass, by mix and implementation, taking turns.

    A plan is made before, as a step makes one for all its layers, in blocks of `block` or what fits.
    """
    cpu = jax.default_backend() == "cpu"
    mixes = CPU_MIXES if cpu else MIXES
    if cpu:
        heads, kv_heads, head_dim = CPU_HEADS
    rows = {}
    for mix, (length, kind) in mixes.items():
        console.print(f"measuring {mix}")
        document = documents(length, kind)
        case = Case(
            implementation="splash",
            target=jax.default_backend(),
            length=length,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            block=block or Case.block,
            bound=bound,
        )
        rows |= {f"{mix}, {phase}": line for phase, line in _measured(case, document, block, turns).items()}
    return rows


def implementations(case: Case, document: np.ndarray, block: int | None) -> tuple[str, dict[str, tuple[Call, Any]]]:
    """Our implementation of this device; of all, `call(q, k, v, seen)` over `[1, T, heads, K]`, and what is seen."""
    visibility = jax.tree.map(jnp.asarray, packed_causal(document[None]))

    def named(name: Any) -> tuple[Call, Any]:
        def call(q: jax.Array, k: jax.Array, v: jax.Array, seen: Any) -> jax.Array:
            return api.attention(q, k, v, seen, logit_bound=case.bound, implementation=name)[0]

        def plan(seen: Any) -> Any:
            if block is not None and name != "reference":
                return plans.make(seen, plans.Blocks(block, block))
            return api.plan_for(
                seen, heads=case.heads, kv_heads=case.kv_heads, head_dim=case.head_dim, implementation=name
            )

        return call, jax.jit(plan)(visibility)

    def peer(make: Callable[[Case], bench_attention_peers.Program]) -> tuple[Call, Any]:
        program = make(case)

        def call(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
            q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * case.head_dim**-0.5, k, v))
            return jnp.swapaxes(program.call(q.astype(k.dtype), k, v, ids), 1, 2)

        return call, jnp.asarray(document[None])

    def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, _: Any) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

    backend = jax.default_backend()
    if backend == "tpu":
        found = {"pallas_tpu": named("pallas_tpu"), "splash": peer(bench_attention_peers.splash)}
        try:
            found["tokamax"] = peer(bench_attention_peers.tokamax)
        except ConfigError as e:
            console.print(f"without tokamax: {e}")
        return "pallas_tpu", found
    if backend == "gpu":
        others = {"xla": named("xla"), "cudnn, causal without documents": (cudnn, None)}
        return "pallas_gpu", {"pallas_gpu": named("pallas_gpu")} | others
    return "xla", {"xla": named("xla"), "reference": named("reference")}


def _measured(case: Case, document: np.ndarray, block: int | None, turns: int) -> dict[str, dict[str, Any]]:
    ours, calls = implementations(case, document, block)
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    keys = jax.random.split(jax.random.key(0), 3)
    counts = (case.heads, case.kv_heads, case.kv_heads)
    arrays = [
        jax.random.normal(key, (1, case.length, n, case.head_dim), dtype) for key, n in zip(keys, counts, strict=True)
    ]
    lines: dict[str, dict[str, Any]] = {}
    for phase in ("forward", "forward and backward"):
        programs, line = {}, {}
        for name, (call, seen) in calls.items():
            function = call if phase == "forward" else jax.grad(_squares(call), argnums=(0, 1, 2))
            try:
                programs[name] = jax.jit(function).lower(*arrays, seen).compile(), (*arrays, seen)
            except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as e:
                line[f"{name}, failed"] = str(e).splitlines()[0][:80]  # what one lacks must not end the others
        seconds = _seconds(programs, turns)
        for name, (program, _) in programs.items():
            memory: Any = program.memory_analysis()
            line[f"{name}, ms"] = round(1e3 * seconds[name], 2)
            line[f"{name}, temporary MB"] = None if memory is None else round(memory.temp_size_in_bytes / 1e6, 1)
        if ours in seconds:
            line |= {f"{name} / {ours}": round(s / seconds[ours], 2) for name, s in seconds.items() if name != ours}
            if jax.default_backend() == "gpu":
                line |= useful(case, document, phase, seconds[ours])
        lines[phase] = line
    return lines


def useful(case: Case, document: np.ndarray, phase: str, seconds: float) -> dict[str, float]:
    """Operations per second on what is seen: two products a pair forward, and 2.5 times as many backward."""
    operations = 4 * case.head_dim * case.heads * visible_pairs(document) * (1.0 if phase == "forward" else 3.5)
    reached = operations / seconds / 1e12
    line = {"ours, useful TFLOP/s": round(reached, 1)}
    kind = jax.devices()[0].device_kind
    for name, peak in DENSE_PEAK.items():
        if name in kind:
            line[f"ours, % of {name}'s dense peak"] = round(100.0 * reached / peak, 1)
    return line


def _squares(call: Call) -> Call:
    return lambda q, k, v, seen: jnp.sum(call(q, k, v, seen).astype(jnp.float32) ** 2)


def _seconds(programs: dict[str, tuple[Any, tuple[Any, ...]]], turns: int) -> dict[str, float]:
    """Medians; the programs take turns, so that all meet the same load."""
    taken: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(turns + 1):
        for name, (program, arguments) in programs.items():
            begin = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            if turn:  # the first one warms up
                taken[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in taken.items()}
