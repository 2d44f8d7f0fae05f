"""Tensors of a checkpoint into sharded arrays: block by block, so that little is in memory besides the arrays.

A leaf may be a stack of layers, each of them a tensor, and may have more rows than the checkpoint, as padding. Each
device's part is filled in place by blocks of at most BLOCK bytes; no tensor is ever held whole a second time.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmgpt.interop.names import Entry
from mmgpt.interop.safetensors_folder import FolderError, SafetensorsFolder, shown

BLOCK = 16 << 20
"""Bytes that are read, converted and handed to a device at a time."""
WEIGHTS = ("F32", "BF16", "F16")
"""Number formats of parameters: each converts to float32 and back without loss."""
COUNTS = ("I64", "I32")

Index = tuple[slice, ...]


def check(entries: Sequence[Entry], source: SafetensorsFolder) -> None:
    """FolderError that lists every name, shape and number format in which the folder differs from the model."""
    expected = {entry.hf_name: entry for entry in entries}
    lines = []
    for name in sorted(expected.keys() | source.tensors.keys()):
        entry, tensor = expected.get(name), source.tensors.get(name)
        if tensor is None and entry is not None:
            lines.append(f"{shown(name)}: missing, expected {list(entry.hf_shape)}")
        elif entry is None and tensor is not None:
            lines.append(f"{shown(name)}: {tensor.dtype}{list(tensor.shape)}, the model has no such tensor")
        elif entry is not None and tensor is not None:
            if tensor.shape != entry.hf_shape:
                lines.append(f"{name}: shape {list(tensor.shape)}, expected {list(entry.hf_shape)}")
            wanted = COUNTS if entry.hf_name.endswith("num_batches_tracked") else WEIGHTS
            if entry.path is not None and tensor.dtype not in wanted:
                lines.append(f"{name}: numbers are {tensor.dtype}, expected {', '.join(wanted)}")
    if lines:
        raise FolderError(
            f"{source.folder}: {len(lines)} of {len(expected.keys() | source.tensors.keys())} tensors do not fit the "
            "model that its config.json describes:\n  " + "\n  ".join(lines) + "\nThe two must be of one checkpoint."
        )


def load(
    entries: Sequence[Entry], source: SafetensorsFolder, abstract: dict[str, Any], dtype: jnp.dtype | None = None
) -> dict[str, Any]:
    """The state `abstract` (shapes, dtypes and concrete shardings) with the checkpoint's numbers in it.

    `dtype` holds parameters in another number format than the model's own. Every process reads what its devices hold.
    """
    by_path: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        if entry.path is not None:
            by_path[entry.path].append(entry)

    def leaf(path: Any, shape: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert by_path[name], name
        held = shape.dtype if dtype is None or not name.startswith("params/") else dtype
        array = _array(by_path[name], source, shape, np.dtype(held))
        source.release()
        return array

    return jax.tree.map_with_path(leaf, abstract)


def _array(parts: list[Entry], source: SafetensorsFolder, leaf: jax.ShapeDtypeStruct, dtype: np.dtype) -> jax.Array:
    sharding = leaf.sharding
    assert isinstance(sharding, jax.sharding.NamedSharding)
    shards = []
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        whole = tuple(slice(*part.indices(size)) for part, size in zip(index or (), leaf.shape, strict=True))
        shards.append(_shard(parts, source, whole, dtype, device))
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


def _shard(parts: list[Entry], source: SafetensorsFolder, whole: Index, dtype: np.dtype, device: Any) -> jax.Array:
    """One device's part of a leaf; `whole` tells which."""
    shape = tuple(part.stop - part.start for part in whole)
    if math.prod(shape) * dtype.itemsize <= BLOCK:
        host = np.zeros(shape, dtype)
        for at, block in _blocks(parts, source, whole, BLOCK // dtype.itemsize):
            host[tuple(slice(a, a + n) for a, n in zip(at, block.shape, strict=True))] = block
        return jax.device_put(host, device)
    place = jax.sharding.SingleDeviceSharding(device)
    buffer = jax.block_until_ready(jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=place)())
    for at, block in _blocks(parts, source, whole, BLOCK // dtype.itemsize):
        numbers = jax.device_put(np.asarray(block, dtype, order="C"), device)
        buffer = jax.block_until_ready(_write(buffer, numbers, np.array(at, np.int32)))
        numbers.delete()  # before the next block is read
        source.release()
    return buffer


def _blocks(parts: list[Entry], source: SafetensorsFolder, whole: Index, most: int) -> Any:
    """(place in the shard, numbers) of all blocks, each of at most `most` numbers or one slice."""
    for entry in parts:
        view = entry.to_ours(source.read(entry.hf_name))
        index, shift = whole, ()
        if entry.layer is not None:
            if not whole[0].start <= entry.layer < whole[0].stop:
                continue
            index, shift = whole[1:], (entry.layer - whole[0].start,)
        view = view[tuple(slice(p.start, min(p.stop, n)) for p, n in zip(index, view.shape, strict=True))]
        if view.size == 0:
            continue  # a device that holds nothing but padding
        axis = int(np.argmax(view.strides)) if view.ndim else 0  # along it the file is read in order
        step = max(1, most // max(1, view.size // view.shape[axis])) if view.ndim else 1
        for first in range(0, view.shape[axis] if view.ndim else 1, step):
            block = view if not view.ndim else view[(slice(None),) * axis + (slice(first, first + step),)]
            at = tuple(first if i == axis else 0 for i in range(view.ndim))
            yield (*shift, *at), block if entry.layer is None else block[None]


@jax.jit(donate_argnums=0)
def _write(buffer: jax.Array, block: jax.Array, at: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(buffer, block, tuple(at))
