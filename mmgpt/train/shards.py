"""Arrays of a step in a folder that one process has to itself: its own shards, as bytes in safetensors files.

They load where each device wants just the shards that it had: on the same mesh over the same processes.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from mmgpt.train.manifest import named

State = dict[str, Any]
FILE_BYTES = 256 * 2**20
THREADS = 8


def start(folder: Path, state: State) -> Callable[[], dict[str, Any]]:
    """Copies this process's shards to the host, after which they may be donated; what is returned writes them.

    It returns the "shards" of the manifest: "params/kernel[0:4,0:8]", where the brackets hold the shard's place in the
    whole array, -> file. OSError.
    """
    shards = {  # of replicas one
        _key(name, shard.index, leaf.shape): shard.data
        for name, leaf in named(state).items()
        for shard in leaf.addressable_shards
    }
    for shard in shards.values():
        shard.copy_to_host_async()
    # Where the CPU is the device these are views; JAX does not write into what is looked at.
    own = {key: np.asarray(shard).reshape(-1).view(np.uint8) for key, shard in shards.items()}

    def finish() -> dict[str, Any]:
        folder.mkdir(parents=True)
        files = _files(own)
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda file: _write(folder / file, {key: own[key] for key in files[file]}), files))
        return {"shards": {key: file for file, keys in files.items() for key in keys}}

    return finish


def has(body: dict[str, Any], wanted: State) -> bool:
    """Whether a step of this manifest holds all that the devices of this process want."""
    there = body.get("shards", {})
    return all(key in there for name, leaf in named(wanted).items() for key in _places(name, leaf).values())


def load(folder: Path, body: dict[str, Any], wanted: State) -> State:
    """The arrays with the shapes, dtypes and shardings asked for, of a step that `has` them."""
    leaves = named(wanted)
    keys = sorted({key for name, leaf in leaves.items() for key in _places(name, leaf).values()})
    files = {file: [key for key in keys if body["shards"][key] == file] for file in set(body["shards"].values())}
    with ThreadPoolExecutor(THREADS) as pool:
        parts = pool.map(lambda file: _read(folder / file, files[file]), files)
        read = {key: data for part in parts for key, data in part.items()}

    def whole(name: str, leaf: Any) -> jax.Array:
        shape = leaf.sharding.shard_shape(leaf.shape)
        arrays = [
            jax.device_put(read[key].view(leaf.dtype).reshape(shape), device)
            for device, key in _places(name, leaf).items()
        ]
        return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, arrays)

    return jax.tree.unflatten(jax.tree.structure(wanted), [whole(name, leaf) for name, leaf in leaves.items()])


def _places(name: str, leaf: Any) -> dict[Any, str]:
    """The key of what each device of this process holds of an array."""
    places = leaf.sharding.addressable_devices_indices_map(leaf.shape)
    return {device: _key(name, index, leaf.shape) for device, index in places.items()}


def _key(name: str, index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    edges = (part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
    return f"{name}[{','.join(f'{begin}:{end}' for begin, end in edges)}]"


def _files(own: dict[str, np.ndarray]) -> dict[str, list[str]]:
    """File -> keys, of about FILE_BYTES each."""
    files: dict[str, list[str]] = {}
    filled = FILE_BYTES
    for key, data in own.items():
        if filled >= FILE_BYTES:
            filled = 0
            files[f"shards-{len(files):04d}.safetensors"] = []
        files[next(reversed(files))].append(key)
        filled += data.nbytes
    return files


def _write(path: Path, shards: dict[str, np.ndarray]) -> None:
    save_file(shards, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _read(path: Path, keys: Iterable[str]) -> dict[str, np.ndarray]:
    with safe_open(path, "np") as file:
        return {key: file.get_tensor(key) for key in keys}
