"""Compiles attention for an H100 that is not there, by the XLA of JAX's CUDA plugin, in a process of its own:
`python -m tests.kernels.attention.hopper`, which prints what failed."""

import time

import jax
from jax.experimental import topologies

from tests.kernels.attention.mosaic import SHAPES, Shape, compiled

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

GPU_SHAPES = (
    *SHAPES,
    Shape(name="head dim 128", queries=4096, keys=4096, heads=32, kv_heads=8, head_dim=128, soft_cap=30.0, sinks=True),
    Shape(name="float32", queries=2048, keys=2048, heads=4, kv_heads=2, head_dim=256, dtype="float32"),
)
"""float32 at the widest heads takes the most shared memory for its tiles."""


if __name__ == "__main__":
    chips = topologies.get_topology_desc("", "cuda", target_config=H100, topology="1x1x1").devices
    auto = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=chips)
    for shape in GPU_SHAPES:
        begin = time.monotonic()
        try:
            compiled(shape, auto, "pallas_gpu", "cuda")
            print(f"{shape.name}: compiled in {time.monotonic() - begin:.1f} s", flush=True)
        except Exception as e:
            print(f"{shape.name}: FAILED {e}", flush=True)
