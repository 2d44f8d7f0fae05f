"""Safetensors files in a folder, one or several with an index: what they hold is known and checked from their headers.

Nothing of a file is trusted: lengths, offsets, names and shapes are compared with one another and with the file's size
before a single number is read. Tensors are views of the mapped files.
"""

import dataclasses
import json
import math
import mmap
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mmgpt.core.errors import UserError
from mmgpt.core.log import printable

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""Names of the number formats in a header; all are little-endian."""
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
HEADER_BYTES = 100_000_000
"""The longest header that the reference implementation reads."""
AGAIN = "Copy or download it again."


class FolderError(UserError, ValueError):
    """A folder of safetensors that cannot be used; the message says which file or tensor, and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor as a header tells it; its bytes are `begin` to `end` of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int


class SafetensorsFolder:
    """All tensors of a folder by name; `metadata` is what their headers say besides."""

    def __init__(self, folder: Path):
        """Reads and checks the headers alone. FolderError tells the first file at fault."""
        self.folder = folder
        self.tensors: dict[str, Tensor] = {}
        self.metadata: dict[str, str] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        files, listed = _files(folder)
        for file in files:
            tensors, metadata = read_header(file)
            self.metadata |= metadata
            for tensor in tensors:
                if tensor.name in self.tensors:
                    other = self.tensors[tensor.name].file.name
                    raise FolderError(f"{folder}: {other} and {file.name} both hold {shown(tensor.name)}. {AGAIN}")
                self.tensors[tensor.name] = tensor
        if listed is not None:
            self._compare(listed)

    def _compare(self, listed: dict[str, str]) -> None:
        """Every tensor lies in the file that the index names for it."""
        found = {name: tensor.file.name for name, tensor in self.tensors.items()}
        listed = {name: shown(file) for name, file in listed.items()}
        faults = [
            f"  {shown(name)}: the index says {listed.get(name, 'nothing')}, it lies in {found.get(name, 'no file')}"
            for name in sorted(found.keys() | listed.keys())
            if found.get(name) != listed.get(name)
        ]
        if faults:
            raise FolderError(f"{self.folder / INDEX} does not fit the files beside it:\n" + "\n".join(faults))

    def read(self, name: str) -> np.ndarray:
        """A tensor as a read-only view of the mapped file, in the file's own number format."""
        tensor = self.tensors[name]
        if tensor.file not in self._maps:
            with open(tensor.file, "rb") as file:
                self._maps[tensor.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        count = math.prod(tensor.shape)
        if count == 0:
            return np.zeros(tensor.shape, DTYPES[tensor.dtype])
        found = np.frombuffer(self._maps[tensor.file], DTYPES[tensor.dtype], count, tensor.begin)
        return found.reshape(tensor.shape)

    def release(self) -> None:
        """Lets the pages go that reading has brought into memory; views stay valid and read them again."""
        for mapped in self._maps.values():
            mapped.madvise(mmap.MADV_DONTNEED)


def has_safetensors(folder: Path) -> bool:
    """Whether the folder holds safetensors files directly."""
    return any(folder.glob("*.safetensors")) or (folder / INDEX).exists()


def _files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files to read, and the file of each tensor where an index says so."""
    if not folder.is_dir():
        raise FolderError(f"{folder}: no such folder.")
    if not (folder / INDEX).exists():
        there = sorted(folder.glob("*.safetensors"))
        if (folder / SINGLE) in there or len(there) == 1:
            return [folder / SINGLE if (folder / SINGLE) in there else there[0]], None
        if not there:
            raise FolderError(
                f"{folder}: holds no .safetensors file. Checkpoints in other formats (.bin, .pt, .ckpt) carry code and "
                "are not read; save them as safetensors first."
            )
        raise FolderError(f"{folder}: {len(there)} safetensors files but no {INDEX} that tells them apart. {AGAIN}")
    listed = _index(folder / INDEX)
    names = sorted(set(listed.values()))
    outside = [n for n in names if n != Path(n).name or "\\" in n or not n.endswith(".safetensors")]
    if outside:
        raise FolderError(
            f"{folder / INDEX} names files that are no .safetensors beside it: {', '.join(map(shown, outside))}. "
            "It may have been made to reach other files; get the folder from where you trust it."
        )
    if (folder / SINGLE).exists() and SINGLE not in names:
        raise FolderError(f"{folder} holds both {SINGLE} and {INDEX}, which does not name it; remove one of them.")
    missing = [n for n in names if not (folder / n).is_file()]
    if missing:
        raise FolderError(f"{folder}: {INDEX} names files that are missing: {', '.join(map(shown, missing))}. {AGAIN}")
    return [folder / n for n in names], listed


def _index(path: Path) -> dict[str, str]:
    _check_regular(path)
    try:
        body = json.loads(path.read_bytes(), object_pairs_hook=_unique)
        listed = body["weight_map"]
        fits = all(isinstance(v, str) for v in listed.values()) and listed
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise FolderError(f"{path}: not an index of safetensors ({shown(str(e))}). {AGAIN}") from e
    if not fits:
        raise FolderError(f'{path}: "weight_map" must name a file for each tensor. {AGAIN}')
    return listed


def _check_regular(path: Path) -> None:
    if not path.is_file():  # a pipe would never end
        raise FolderError(f"{path}: not a regular file. {AGAIN}")


def read_header(path: Path) -> tuple[list[Tensor], dict[str, str]]:
    """The tensors and the metadata of one file; FolderError says what does not fit."""
    _check_regular(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise FolderError(f"{path}: {size} bytes, but its header would end at {8 + length}: cut off. {AGAIN}")
        if length > HEADER_BYTES:
            raise FolderError(f"{path}: a header of {length} bytes, at most {HEADER_BYTES} are read. {AGAIN}")
        text = file.read(length)
    try:
        body = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as e:
        raise FolderError(f"{path}: its header is no JSON table of tensors ({shown(str(e))}). {AGAIN}") from e
    if not isinstance(body, dict):
        raise FolderError(f"{path}: its header is no JSON table of tensors. {AGAIN}")
    metadata = body.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FolderError(f"{path}: the header's __metadata__ is no table of texts. {AGAIN}")
    tensors = sorted((_tensor(path, 8 + length, *item) for item in body.items()), key=lambda t: (t.begin, t.end))
    at = 8 + length
    for tensor in tensors:
        if tensor.begin != at:
            what = "overlaps the one before it" if tensor.begin < at else "leaves a gap before it"
            raise FolderError(f"{path}: tensor {shown(tensor.name)} {what}. {AGAIN}")
        at = tensor.end
    if at != size:
        raise FolderError(f"{path}: {size} bytes, but its tensors end at {at}: cut off or padded. {AGAIN}")
    return tensors, metadata


def _tensor(path: Path, start: int, name: str, body: Any) -> Tensor:
    where = f"{path}: tensor {shown(name)}"
    try:
        dtype, shape, (begin, end) = body["dtype"], body["shape"], body["data_offsets"]
        numbers = [*shape, begin, end]
    except (KeyError, TypeError, ValueError) as e:
        raise FolderError(f"{where}: expected dtype, shape and two data_offsets. {AGAIN}") from e
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        raise FolderError(f"{where}: shape and offsets must be numbers from 0 up. {AGAIN}")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FolderError(f"{where}: number format {shown(str(dtype))} is not one of {', '.join(DTYPES)}.")
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != expected:
        raise FolderError(
            f"{where}: {dtype}{shape} takes {expected} bytes, its offsets {begin} to {end} hold {end - begin}. {AGAIN}"
        )
    return Tensor(name=name, dtype=dtype, shape=tuple(shape), file=path, begin=start + begin, end=start + end)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} stands there twice")
    return found


def shown(text: str) -> str:
    """A foreign name made safe for the console."""
    return printable(re.sub(r"\s+", " ", text), 120)
