"""Options for the TPU's compiler, by generation, each with its reason; other devices have none.

They were chosen by what the compiled programs of an 8B decoder's step look like (`mmgpt plan`), with libtpu 0.0.52;
0.0.42 knows them too. No TPU was at hand to measure.
"""

from typing import NamedTuple

from mmgpt.dist.mesh import device_kind, platform


class Option(NamedTuple):
    """`kinds`: beginnings of the device kinds that it is for."""

    name: str
    value: str
    kinds: tuple[str, ...]
    why: str


V5E, V5P, V6E, V7X = "TPU v5 lite", "TPU v5", "TPU v6", "TPU7x"
SPARSE = (V5P, V6E, V7X)
"""Chips with SparseCores, which can move data while the TensorCores compute."""
ALL = ("TPU v4", *SPARSE)
_OFFLOAD = "xla_tpu_enable_sparse_core_collective_offload_"

OPTIONS = (
    Option(f"{_OFFLOAD}all_gather", "true", SPARSE, "Gathers run beside the products; on the TensorCore they wait."),
    Option(f"{_OFFLOAD}2d_all_gather", "true", SPARSE, "The same over two dimensions of the torus, as FSDP lies."),
    Option(f"{_OFFLOAD}3d_all_gather", "true", SPARSE, "The same over three dimensions."),
    Option(
        "xla_tpu_prefer_async_allgather_to_allreduce",
        "true",
        SPARSE,
        "A gather over a whole torus would become an all-reduce of whole weights: twice the bytes, and their memory.",
    ),
    Option(f"{_OFFLOAD}reduce_scatter", "true", SPARSE, "Sums of gradients run beside the products."),
    Option(f"{_OFFLOAD}nd_reduce_scatter", "true", SPARSE, "The same over several dimensions of the torus."),
    Option(f"{_OFFLOAD}all_reduce", "true", SPARSE, "Sums over replicas run beside the products."),
    Option("xla_tpu_enable_ici_ag_pipelining", "true", ALL, "A layer's weights are gathered during the layer before."),
    Option("xla_tpu_enable_ici_rs_pipelining", "true", ALL, "A layer's gradients are summed during the next layer."),
    Option("xla_tpu_enable_ici_ar_pipelining", "true", ALL, "The same for sums over replicas."),
    Option(
        "xla_disable_hlo_passes",
        "while-loop-all-reduce-code-motion",
        (*ALL, V5E),
        "With microbatches it holds whole gradients until a loop ends, to sum them over devices once, or fails to.",
    ),
    Option(
        "xla_jf_spmd_threshold_for_windowed_einsum_mib",
        "1000000",
        (V6E, V7X),
        "No product in pieces beside its reduce-scatter: the pieces want transposed copies, a fifth of a v6e's step.",
    ),
    Option(
        "xla_tpu_scoped_vmem_limit_kib",
        "32768",
        (V5P,),
        "Larger windows of a product: 98 % of the peak where 16 MB gave 85 to 93 %, by the compiler's estimates.",
    ),
    Option(
        "xla_tpu_scoped_vmem_limit_kib",
        "98304",
        (V6E,),
        "The same for a v6e, which has 128 MB: 63 % of the peak without it.",
    ),
    Option("xla_tpu_scoped_vmem_limit_kib", "65536", (V7X,), "The same for a core of a v7x, which has 64 MB."),
)


def options() -> dict[str, str]:
    """The options for the current mesh's devices, as `jax.jit` takes them."""
    if platform() != "tpu":
        return {}
    kind = device_kind()
    lite = kind.startswith(V5E)
    return {o.name: o.value for o in OPTIONS if any(kind.startswith(k) and (k != V5P or not lite) for k in o.kinds)}
