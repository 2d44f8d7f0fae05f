"""`mmgpt train` in a process of its own, with faults that only its inside can have: `python -m tests.soak.trainer`.

    python -m tests.soak.trainer '{"nan": [80], "spike": [], "wrong": 3, "pause": 0.04}' FOLDER [--key value ...]

All else is the real command. `nan` and `spike` are rows that harm whenever they are trained on; of the replayed step
number `wrong` of this life, counted from 1, one of the two outcomes has a flipped bit; `pause` seconds go by at each
step.
"""

import itertools
import json
import sys
import time
from typing import Any

import jax
import numpy as np

from mmgpt import cli
from mmgpt.train import loop, replay
from tests.train import poison


def flipped(state: Any, chance: np.random.Generator) -> Any:
    """The state with one bit of one array flipped, on one device."""
    leaves, tree = jax.tree.flatten(state)
    place = int(chance.integers(len(leaves)))
    parts = [np.array(shard.data, copy=True) for shard in leaves[place].addressable_shards]
    data = parts[int(chance.integers(len(parts)))].reshape(-1).view(np.uint8)
    data[chance.integers(data.size)] ^= np.uint8(1 << chance.integers(8))
    held = zip(parts, leaves[place].addressable_shards, strict=True)
    arrays = [jax.device_put(part, shard.device) for part, shard in held]
    leaves[place] = jax.make_array_from_single_device_arrays(leaves[place].shape, leaves[place].sharding, arrays)
    return jax.tree.unflatten(tree, leaves)


def main() -> int:
    faults, command = json.loads(sys.argv[1]), sys.argv[2:]
    make_step, twice = poison.make_step(faults["nan"], faults["spike"]), replay.twice
    replays = itertools.count(1)

    def slow(*built: Any, **settings: Any) -> Any:
        step = make_step(*built, **settings)

        def paused(state: Any, batch: Any) -> Any:
            time.sleep(faults["pause"])
            return step(state, batch)

        return paused

    def faulty(step: Any, state: Any, batch: Any, number: int, run_dir: Any) -> Any:
        chance, calls = np.random.default_rng(number), itertools.count()
        wrong = int(chance.integers(2)) if next(replays) == faults["wrong"] else -1

        def once_wrong(state: Any, batch: Any) -> Any:
            state, values = step(state, batch)
            return (flipped(state, chance), values) if next(calls) == wrong else (state, values)

        return twice(once_wrong, state, batch, number, run_dir)

    loop.make_step, replay.twice = slow, faulty  # pyright: ignore[reportAttributeAccessIssue]
    return cli.main(["train", *command])


if __name__ == "__main__":
    sys.exit(main())
