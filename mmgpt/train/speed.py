"""How busy the machine is: operations of a step beside a plain matmul measured in the same process."""

import time

import jax
import jax.numpy as jnp

from mmgpt.nn.param import act


def matmul_peak(size: int = 2048, repeats: int = 3) -> float:
    """Best float32 FLOP/s of plain square matmuls, one on each device at once; inside `jax.set_mesh`."""
    shape = (jax.device_count(), size, size)
    # The batch axes have fewer ways where a mesh splits sequences or heads: then each device takes several.
    a = jax.jit(lambda: act(jnp.ones(shape, jnp.float32), "batch height width"))()
    ways = a.shape[0] // a.sharding.shard_shape(shape)[0]
    product = jax.jit(lambda a: jnp.einsum("nij,njk->nik", a, a))
    product(a).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        product(a).block_until_ready()
        best = min(best, time.perf_counter() - begin)
    done = jax.device_count() * shape[0] / ways  # replicas do the same work again
    return 2.0 * done * size**3 / best


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
