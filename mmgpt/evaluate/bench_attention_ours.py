"""Our kernel in `mmgpt bench attention`: the program to compile, and how its parts are told in the dump."""

import jax
import jax.numpy as jnp
import numpy as np

from mmgpt.core.stream import packed_causal
from mmgpt.evaluate.bench_attention_peers import Case, Program
from mmgpt.kernels.attention import pallas_tpu, plan

FORWARD, BACKWARD = "attention_forward", "attention_backward"
"""Parts of the names that the kernels' `pallas_call`s have."""
BODIES = ("full", "edge", "mixed")
"""The classes of the kernels' bodies, in the order of the program."""


def ours(case: Case) -> Program:
    """`call(q, k, v, plan)` over `q [B, T, H, K]`, `k, v [B, T, G, K]` and the plan of packed documents."""

    def call(q: jax.Array, k: jax.Array, v: jax.Array, blocks: plan.Plan) -> jax.Array:
        return pallas_tpu.attention(
            q, k, v, blocks, scale=case.head_dim**-0.5, soft_cap=None, sinks_H=None, logit_bound=case.bound
        )[0]

    def of(heads: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((case.sequences, case.length, heads, case.head_dim), jnp.bfloat16)

    seen = packed_causal(np.zeros((case.sequences, case.length), np.int32))
    blocks = jax.eval_shape(lambda seen: plan.make(seen, plan.Blocks(case.block, case.block)), seen)
    return Program(call, (of(case.heads), of(case.kv_heads), of(case.kv_heads), blocks))
