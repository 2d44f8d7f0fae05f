"""Our kernels in `mmgpt bench attention`: the programs to compile, and how their parts are told in the dump."""

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmgpt.core.config import ConfigError
from mmgpt.core.stream import Visibility, packed_causal
from mmgpt.evaluate.bench_attention_peers import Case, Program
from mmgpt.kernels.attention import pallas_tpu, plan
from mmgpt.kernels.attention.logits import Options
from mmgpt.plan.kernel_cycles import Kernel

FORWARD, BACKWARD = "attention_forward", "attention_backward"
"""Parts of the names that the kernels' `pallas_call`s have."""
BODIES = ("full", "edge", "mixed")
"""The classes of the kernels' bodies, in the order of the program."""
KINDS = {"v5p": "TPU v5", "v5e": "TPU v5 lite", "v6e": "TPU v6 lite", "v7x": "TPU7x"}
"""What JAX calls the targets."""
ESTIMATE, NEVER = re.compile(r'"estimated_cycles":"(\d+)"'), 10**15
BODY, BRANCHES = re.compile(r"\bbody=(%[\w.-]+)"), re.compile(r"branch_computations=\{([^}]*)\}")
"""What the compiler says of operations of a program, loops and conditionals."""


def side(case: Case, length: int) -> int:
    """Queries and keys of the kernels' blocks in rows of `length`, where nobody says otherwise."""
    R = case.heads // case.kv_heads
    return max(pallas_tpu.blocks(length, length, R, case.head_dim, kind=KINDS[case.target]))


def ours(case: Case) -> Program:
    """`call(q, k, v, plan)` over `q [B, H, T, K]`, `k, v [B, G, T, K]`, as the peers have them, and a plan."""

    def call(q: jax.Array, k: jax.Array, v: jax.Array, blocks: plan.Plan) -> jax.Array:
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
        options = {"scale": case.head_dim**-0.5, "soft_cap": None, "sinks_H": None, "logit_bound": case.bound}
        return jnp.swapaxes(pallas_tpu.attention(q, k, v, blocks, **options)[0], 1, 2)

    def of(heads: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((case.sequences, heads, case.length, case.head_dim), jnp.bfloat16)

    return Program(call, (of(case.heads), of(case.kv_heads), of(case.kv_heads), _plan(case)))


def backward_alone(case: Case) -> tuple[Any, list[Any]]:
    """The backward pass from what a layer keeps, in the kernels' layout, and the shapes of what it takes."""
    G, R, K = case.kv_heads, case.heads // case.kv_heads, case.head_dim
    N = case.sequences * case.length
    flat = pallas_tpu.side_by_side(K)
    static = pallas_tpu.Static(Options(soft_cap=None, bounded=case.bound is not None), flat, False)

    def call(q: Any, k: Any, v: Any, blocks: plan.Plan, out: Any, lse: Any, d_out: Any) -> Any:
        kept = q, k, v, None, blocks, out, lse
        return pallas_tpu.gradients(static, kept, (d_out, jnp.zeros_like(lse)))[:3]

    of_queries, of_keys = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((G, R, N, K), (G, N, K)))
    sums = jax.ShapeDtypeStruct((G, R, N), jnp.float32)
    outputs = jax.ShapeDtypeStruct((N, G * R * K), jnp.bfloat16) if flat else of_queries
    return call, [of_queries, of_keys, of_keys, _plan(case), outputs, sums, outputs]


def fixed_grid(case: Case) -> tuple[Any, list[Any]]:
    """`backward_alone` with as many steps as a causal row has, a number of the program: the dump then has it too."""
    call, shapes = backward_alone(case)

    def fixed(q: Any, k: Any, v: Any, blocks: plan.Plan, out: Any, lse: Any, d_out: Any) -> Any:
        count: Any = [_steps(case)]
        return call(q, k, v, dataclasses.replace(blocks, count_by_key=count), out, lse, d_out)

    return fixed, shapes


def cores(case: Case, kernel: Kernel) -> float:
    """Cores of a chip among which the compiler shares out the steps of `fixed_grid`."""
    if kernel.steps is None:
        raise ConfigError(f"{kernel.name}: the dump of {case} does not tell the steps of a core.")
    return case.kv_heads * _steps(case) / kernel.steps


def _steps(case: Case) -> int:
    side = case.length // case.block
    return side * (side + 1) // 2


def planning(case: Case) -> tuple[Any, list[Any]]:
    """The making of a plan, and the shapes of the visibility."""
    blocks = plan.Blocks(case.block, case.block)
    return lambda seen: plan.make(seen, blocks), [_seen(case)]


def estimated(program: str, trips: int) -> tuple[int, int]:
    """Cycles by the compiler's own estimates, with the cheapest and with the dearest branch of every conditional.

    Every loop counts `trips` turns, which is right for those over blocks of keys, and too many for searches.
    """
    own: dict[str, int] = {}
    bodies: dict[str, list[str]] = {}
    choices: dict[str, list[list[str]]] = {}
    name = entry = ""
    for line in program.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            words = line.split()
            name = words[1] if words[0] == "ENTRY" else words[0]
            entry = name if words[0] == "ENTRY" else entry
            own[name], bodies[name], choices[name] = 0, [], []
        elif name:
            own[name] += sum(int(n) for n in ESTIMATE.findall(line) if int(n) < NEVER)
            bodies[name] += BODY.findall(line)
            choices[name] += [found.split(", ") for found in BRANCHES.findall(line)]

    def cost(name: str, choose: Callable[[Iterable[int]], int]) -> int:
        loops = trips * sum(cost(body, choose) for body in bodies[name])
        return own[name] + loops + sum(choose([cost(b, choose) for b in found]) for found in choices[name])

    return cost(entry, min), cost(entry, max)


def _seen(case: Case) -> Visibility:
    row = np.zeros((case.sequences, case.length), np.int32)
    return jax.eval_shape(lambda: jax.tree.map(jnp.asarray, packed_causal(row)))


def _plan(case: Case) -> Any:
    return jax.eval_shape(lambda seen: plan.make(seen, plan.Blocks(case.block, case.block)), _seen(case))
