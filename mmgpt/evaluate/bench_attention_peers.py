"""The peers of `mmgpt bench attention`: JAX's splash attention and tokamax's, as their users call them."""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mmgpt.core.config import ConfigError

Implementation = Literal["splash", "tokamax", "ours"]
COMPUTE = 512
"""Keys that the peers' inner loop takes at once: the faster of 512 and 1024 on v5p."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """`sequences` rows of `length` tokens on a chip, square blocks of `block`; `bound` of the logits, if known."""

    implementation: Implementation
    target: str
    length: int = 8192
    sequences: int = 1
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    block: int = 1024
    bound: float | None = None


@dataclasses.dataclass(frozen=True)
class Program:
    """`call(q, k, v, mask) -> out`, and the shapes of its arguments."""

    call: Callable[..., jax.Array]
    arguments: tuple[Any, Any, Any, Any]

    def backward(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: Any, grad: jax.Array) -> Any:
        """The gradients of q, k, v for `grad` of the output; the forward pass is in it."""
        _, pull = jax.vjp(lambda q, k, v: self.call(q, k, v, mask), q, k, v)
        return pull(grad)


def splash(case: Case) -> Program:
    """JAX's: causal mask and segment ids, the fused backward pass. `q [B, H, T, K]`, `k, v [B, G, T, K]`."""
    kernels, masks = _imported("jax.experimental.pallas.ops.tpu.splash_attention", "jax")
    sizes = kernels.BlockSizes(**_sizes(case), use_fused_bwd_kernel=True)
    mask = masks.MultiHeadMask([masks.CausalMask((case.length, case.length))] * case.heads)
    return _program(case, kernels, kernels.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1))


def tokamax(case: Case) -> Program:
    """tokamax's: the same; `bound` stands for the running maximum. ConfigError where tokamax is not installed."""
    kernels, masks = _imported("tokamax._src.ops.experimental.tpu.splash_attention", "mmgpt[bench]")
    config = kernels.SplashConfig(**_sizes(case), max_logit_const=case.bound)
    mask = masks.CausalMask((case.length, case.length))
    return _program(case, kernels, kernels.make_splash_mha(mask, config=config, q_seq_shards=1))


def _imported(package: str, extra: str) -> tuple[Any, Any]:
    try:
        names = ("splash_attention_kernel", "splash_attention_mask")
        kernels, masks = (importlib.import_module(f"{package}.{name}") for name in names)
    except ImportError as e:
        raise ConfigError(f"a peer is missing ({e}): `pip install {extra}`; tokamax needs Python 3.12.") from e
    return kernels, masks


def _sizes(case: Case) -> dict[str, int]:
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv")
    compute = min(COMPUTE, case.block)
    return dict.fromkeys(names, case.block) | {"block_kv_compute": compute, "block_kv_dkv_compute": compute}


def _program(case: Case, kernels: Any, kernel: Any) -> Program:
    def row(q: jax.Array, k: jax.Array, v: jax.Array, document: jax.Array) -> jax.Array:
        return kernel(q, k, v, segment_ids=kernels.SegmentIds(document, document))

    def call(q: jax.Array, k: jax.Array, v: jax.Array, document: jax.Array) -> jax.Array:
        if case.sequences == 1:  # a vmapped axis, even of size 1, would be spread over both cores of a chip
            return row(q[0], k[0], v[0], document[0])[None]
        return jax.vmap(row)(q, k, v, document)

    def of(heads: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((case.sequences, heads, case.length, case.head_dim), jnp.bfloat16)

    document = jax.ShapeDtypeStruct((case.sequences, case.length), np.int32)
    return Program(call, (of(case.heads), of(case.kv_heads), of(case.kv_heads), document))
