"""A step done twice is the step; one that came out wrong once is found, wherever the wrong bit is."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmgpt.dist.mesh import Mesh
from mmgpt.objectives.next_token import NextToken
from mmgpt.train import replay
from mmgpt.train.optimizer import Optimizer
from mmgpt.train.replay import NAME, Corruption, twice
from mmgpt.train.state import Structure
from mmgpt.train.step import make_step, place
from tests import tiny

MESHES = {"one": (1, Mesh.Config()), "fsdp": (8, Mesh.Config()), "mixed": (8, Mesh.Config(fsdp=2, context=2, tensor=2))}


@pytest.fixture(scope="module", params=MESHES)
def made(request: pytest.FixtureRequest):
    count, mesh = MESHES[request.param]
    with jax.set_mesh(mesh.build(jax.devices()[:count])):
        structure = Structure(tiny.decoder(dropout=0.1).build, seed=0)
        optimizer = Optimizer.Config(learning_rate=1e-2, warmup=2).build(20)
        objective = NextToken.Config().fit(tiny.grammar().vocabulary).build()
        step = make_step(structure, objective, optimizer, seed=0, ema=0.9)
        yield lambda: tiny.state(structure, optimizer, ema=True), step, place(tiny.batch(8, 64))


def flipped(array: jax.Array, device: Any, bit: int) -> jax.Array:
    """The array with one bit of what a device holds of it flipped."""
    parts = []
    for shard in array.addressable_shards:
        data = np.array(shard.data, copy=True)
        if shard.device == device:
            data.reshape(-1).view(np.uint8)[bit // 8 % data.nbytes] ^= np.uint8(1 << bit % 8)
        parts.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)


def test_a_replayed_step_is_the_step(made: Any, tmp_path: Path) -> None:
    fresh, step, batch = made
    expected = jax.device_get(step(fresh(), batch))
    found = jax.device_get(twice(step, fresh(), batch, 1, tmp_path))
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))
    again = jax.device_get(step(twice(step, fresh(), batch, 1, tmp_path)[0], batch))
    assert jax.tree.all(jax.tree.map(np.array_equal, again, jax.device_get(step(step(fresh(), batch)[0], batch))))
    assert not (tmp_path / NAME).exists()


@pytest.mark.parametrize("wrong_time", [0, 1])
@pytest.mark.parametrize("seed", range(4))
def test_one_wrong_bit_is_found_with_the_device_that_holds_it(
    made: Any, tmp_path: Path, wrong_time: int, seed: int
) -> None:
    fresh, step, batch = made
    rng, times = np.random.default_rng(seed), iter(range(2))
    devices = jax.sharding.get_mesh().devices.flatten()
    device = devices[int(rng.integers(len(devices)))]

    def faulty(state: Any, batch: Any) -> Any:
        out, values = step(state, batch)
        if next(times) == wrong_time:
            leaves, tree = jax.tree.flatten(out)
            place = int(rng.integers(len(leaves)))
            leaves[place] = flipped(leaves[place], device, int(rng.integers(1 << 20)))
            out = jax.tree.unflatten(tree, leaves)
        return out, values

    with pytest.raises(Corruption, match=f"step 7 gave other bits.*{device} in 1 of .* arrays"):
        twice(faulty, fresh(), batch, 7, tmp_path)
    (record,) = [json.loads(line) for line in (tmp_path / NAME).read_text().splitlines()]
    assert record["step"] == 7 and str(device) in json.dumps(record["found"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_a_sum_sees_every_flip_and_every_exchange(dtype: str) -> None:
    values = np.random.default_rng(0).integers(0, 2, 64).astype(jnp.dtype(dtype))

    def summed(values: np.ndarray) -> int:
        (found,) = replay._sums({"x": jax.device_put(values, jax.devices()[3])}).values()
        return found

    first = summed(values)
    for i in range(64):
        changed = values.astype(int)
        changed[i] = 1 - changed[i]
        assert summed(changed.astype(values.dtype)) != first
    assert summed(values[::-1]) != first


def test_a_gpu_is_replayed_only_where_it_repeats_its_bits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert replay.possible()
    monkeypatch.setattr(replay, "platform", lambda: "gpu")
    monkeypatch.setenv("XLA_FLAGS", "")
    assert not replay.possible() and replay.DETERMINISTIC in capsys.readouterr().err
    monkeypatch.setenv("XLA_FLAGS", replay.DETERMINISTIC)
    assert replay.possible()
