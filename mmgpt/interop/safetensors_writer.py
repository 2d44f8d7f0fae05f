"""Writes tensors one after another into safetensors files of bounded size, with an index where there are several."""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mmgpt.core.config import ConfigError
from mmgpt.core.log import write_json
from mmgpt.interop.safetensors_folder import DTYPES, INDEX, SINGLE, shown

SHARD_BYTES = 5 * 10**9
"""Size of a file where not asked otherwise, as Hugging Face writes them; a larger tensor has a file of its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """A tensor that is to be written; `dtype` is a name of DTYPES."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def write_folder(
    folder: Path,
    tensors: Sequence[Planned],
    read: Callable[[str], np.ndarray],
    *,
    metadata: dict[str, str],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes all tensors in the order given; `read` gives one at a time, in any number format.

    OSError, and ConfigError where a number is too large for the format to write.
    """
    parts: list[list[Planned]] = [[]]
    for tensor in tensors:
        if parts[-1] and sum(t.bytes for t in parts[-1]) + tensor.bytes > shard_bytes:
            parts.append([])
        parts[-1].append(tensor)
    names = [SINGLE]
    if len(parts) > 1:
        names = [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
        files = {tensor.name: name for name, part in zip(names, parts, strict=True) for tensor in part}
        size = sum(tensor.bytes for tensor in tensors)
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))})
    for name, part in zip(names, parts, strict=True):
        write_file(folder / name, part, read, metadata)


def write_file(
    path: Path, tensors: Sequence[Planned], read: Callable[[str], np.ndarray], metadata: dict[str, str]
) -> None:
    """Writes one file."""
    # Wide numbers first: a tensor's bytes then lie where its numbers are aligned.
    tensors = sorted(tensors, key=lambda t: (-DTYPES[t.dtype].itemsize, t.name))
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.bytes],
        }
        at += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            array = _cast(read(tensor.name), tensor)
            assert array.shape == tensor.shape, tensor
            file.write(array.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())  # a full disk is told here, not when nobody asks any more


def _cast(given: np.ndarray, tensor: Planned) -> np.ndarray:
    with np.errstate(over="ignore"):  # told below, with the tensor's name
        array = np.asarray(given, DTYPES[tensor.dtype], order="C")
    if array.dtype != given.dtype and (lost := not_finite(array) - not_finite(given)):
        raise ConfigError(
            f"{shown(tensor.name)}: {lost} of its {array.size} numbers are too large for {array.dtype}, which would "
            "make them infinite. Convert with --dtype float32 or bfloat16."
        )
    return array


def not_finite(array: np.ndarray) -> int:
    """How many numbers are NaN or infinite."""
    return array.size - int(np.count_nonzero(np.isfinite(array)))
