"""Mutants of files: the same ones for a seed and a number, however many are made and by whom."""

import struct
import zlib
from collections.abc import Callable, Sequence

import numpy as np

EXTREMES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF)
EDGE = 512
"""Bytes at the start and at the end of a file where most of its structure is."""


def mutant(files: Sequence[bytes], seed: int, number: int, repair: Callable[[bytearray], None] | None = None) -> bytes:
    """One of the files with one to four changes; half of them pass `repair`, which makes checksums right again."""
    rng = np.random.default_rng((seed, number))
    data = bytearray(files[rng.integers(len(files))])
    for _ in range(rng.integers(1, 5)):
        CHANGES[rng.integers(len(CHANGES))](rng, data, files)
        if not data:
            break
    if repair is not None and rng.random() < 0.5:
        repair(data)
    return bytes(data)


def _place(rng: np.random.Generator, data: bytearray) -> int:
    """Anywhere, or near an end."""
    size = max(1, len(data))
    kind = rng.integers(3)
    if kind == 0:
        return int(rng.integers(size))
    near = int(rng.integers(min(EDGE, size)))
    return near if kind == 1 else size - 1 - near


def _bits(rng: np.random.Generator, data: bytearray, files: Sequence[bytes]) -> None:
    for _ in range(rng.integers(1, 17)):
        data[_place(rng, data)] ^= 1 << int(rng.integers(8))


def _run(rng: np.random.Generator, data: bytearray, files: Sequence[bytes]) -> None:
    start, size = _place(rng, data), int(rng.integers(1, 65))
    fill = (bytes(size), b"\xff" * size, rng.bytes(size))[rng.integers(3)]
    data[start : start + size] = fill[: len(data) - start]


def _field(rng: np.random.Generator, data: bytearray, files: Sequence[bytes]) -> None:
    """An extreme number of 1, 2, 4 or 8 bytes, of either order."""
    size = (1, 2, 4, 8)[rng.integers(4)]
    value = EXTREMES[rng.integers(len(EXTREMES))] & ((1 << 8 * size) - 1)
    start = _place(rng, data)
    data[start : start + size] = value.to_bytes(size, ("big", "little")[rng.integers(2)])


def _cut(rng: np.random.Generator, data: bytearray, files: Sequence[bytes]) -> None:
    del data[int(rng.integers(len(data) + 1)) :]


def _without(rng: np.random.Generator, data: bytearray, files: Sequence[bytes]) -> None:
    start = _place(rng, data)
    del data[start : start + int(rng.integers(1, 257))]


def _splice(rng: np.random.Generator, data: bytearray, files: Sequence[bytes]) -> None:
    """A piece of another file, or of this one, laid over or put between."""
    other = files[rng.integers(len(files))]
    first, start = int(rng.integers(len(other))), _place(rng, data)
    piece = other[first : first + int(rng.integers(1, 1025))]
    data[start : start + (len(piece) if rng.random() < 0.5 else 0)] = piece


CHANGES = (_bits, _run, _field, _field, _cut, _without, _splice)


# --- checksums, behind which a decoder would otherwise see little of what is wrong


def png_checksums(data: bytearray) -> None:
    """The checksum of every chunk as far as the chunks can be followed."""
    start = 8
    while start + 12 <= len(data):
        size = struct.unpack_from(">I", data, start)[0]
        end = start + 8 + size
        if end + 4 > len(data):
            return
        struct.pack_into(">I", data, end, zlib.crc32(data[start + 4 : end]))
        start = end + 4


def tar_checksums(data: bytearray) -> None:
    """The checksum of every block that is marked as a header."""
    for start in range(0, len(data) - 511, 512):
        if data[start + 257 : start + 262] == b"ustar":
            data[start + 148 : start + 156] = b" " * 8
            data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
