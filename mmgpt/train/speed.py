"""How busy the machine is: operations of a step beside a plain matmul measured in the same process."""

import time

import jax
import jax.numpy as jnp

from mmgpt.dist import axes as rules
from mmgpt.nn.param import act


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


class Meter:
    """Time of the steps since the last reading, without what lies between them (evaluation, saves)."""

    def __init__(self) -> None:
        self._busy = 0.0
        self._wait = 0.0
        self._steps = 0
        self._since: float | None = None

    def resume(self) -> None:
        """The steps begin, or go on after a pause."""
        self._since = time.perf_counter()

    def waited(self, seconds: float) -> None:
        """Part of the time that went to waiting for data."""
        self._wait += seconds

    def step(self) -> None:
        self._steps += 1

    def pause(self) -> None:
        """The steps stop for something else; call it when the device is done."""
        if self._since is not None:
            self._busy += time.perf_counter() - self._since
            self._since = None

    def read(self) -> tuple[int, float, float]:
        """Steps, seconds and seconds of data wait since the last reading."""
        running = self._since is not None
        self.pause()
        reading = self._steps, self._busy, self._wait
        self._steps, self._busy, self._wait = 0, 0.0, 0.0
        if running:
            self.resume()
        return reading
