"""How busy the machine is: operations of a step beside a plain matmul measured in the same process."""

import time

import jax
import jax.numpy as jnp

from mmgpt.core.log import console
from mmgpt.core.stream import Batch
from mmgpt.dist import axes as rules
from mmgpt.nn.param import act
from mmgpt.train.run import Built


def matmul_peak(size: int = 2048, repeats: int = 3) -> float:
    """Best float32 FLOP/s of plain square matmuls, one on each device at once; inside `jax.set_mesh`."""
    shape = (rules.ways("batch", jax.sharding.get_mesh()), size, size)
    a = jax.jit(lambda: act(jnp.ones(shape, jnp.float32), "batch height width"))()
    product = jax.jit(lambda a: jnp.einsum("nij,njk->nik", a, a))
    product(a).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        product(a).block_until_ready()
        best = min(best, time.perf_counter() - begin)
    return 2.0 * jax.device_count() * size**3 / best  # devices that share a row each do all of its work


def speed(built: Built, batch: Batch, reading: tuple[int, float, float], peak: float) -> dict[str, float]:
    """What the metrics tell of some steps, by `Rates.read`, beside a matmul's FLOP/s; nothing where there were none."""
    steps, seconds, wait = reading
    if steps == 0 or seconds <= 0.0:
        return {}
    flops = steps * built.run.model.step_flops(batch) / seconds
    return {
        "step_seconds": seconds / steps,
        "data_wait_share": wait / seconds,
        "flops_per_second": flops,
        "matmul_share": flops / peak,
    }


def tell(done: int, steps: int, figures: dict[str, float]) -> None:
    """One line for a person."""
    parts = [f"{name} {figures[name]:.4g}" for name in ("loss", "gradient_norm", "learning_rate")]
    if "step_seconds" in figures:
        left = round((steps - done) * figures["step_seconds"])
        parts.append(f"{figures['step_seconds']:.3g} s/step  {left // 60}:{left % 60:02d} left")
    console.print(f"step {done}/{steps}  {'  '.join(parts)}")
