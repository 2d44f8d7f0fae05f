"""Draws that are pure functions: hashes of counters and permutations by place, never a running generator.

They are the same for every host, restart and NumPy version, and any part of an order is had without the rest.
"""

import hashlib

import numpy as np

_ROUNDS = 6  # with 4, neighbours of a small permutation stand side by side again half too often


def key(*parts: int | str) -> int:
    """A 64-bit key for a family of draws, e.g. `key(seed, "order", source, epoch)`."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def counter_hash(family: int, counter: np.ndarray) -> np.ndarray:
    """One 64-bit hash per counter: the splitmix64 stream that starts at `family` (Steele et al. 2014). uint64 [N]."""
    z = np.asarray(counter).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(family)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniform(family: int, counter: np.ndarray) -> np.ndarray:
    """One number in [0, 1) per counter, float64 [N]."""
    return (counter_hash(family, counter) >> np.uint64(11)) * 2.0**-53


def permuted(family: int, count: int, place: np.ndarray) -> np.ndarray:
    """What stands at each `place` of a permutation of 0 .. count - 1, int64 [N].

    A Feistel network over the next power of two, walked until it falls below `count` (Black and Rogaway 2002): no
    place costs memory for the others, so that a billion documents are shuffled a chunk at a time.
    """
    low = max(2, (count - 1).bit_length()) // 2
    high = max(2, (count - 1).bit_length()) - low
    low_bits, high_bits, shift = np.uint64((1 << low) - 1), np.uint64((1 << high) - 1), np.uint64(low)
    keys = [key(family, i) for i in range(_ROUNDS)]

    def walked(place: np.ndarray) -> np.ndarray:
        left, right = place >> shift, place & low_bits
        for i in range(0, _ROUNDS, 2):
            left = (left + counter_hash(keys[i], right)) & high_bits
            right = (right + counter_hash(keys[i + 1], left)) & low_bits
        return (left << shift) | right

    out = walked(np.asarray(place).astype(np.uint64))
    while len(outside := np.flatnonzero(out >= np.uint64(count))):
        out[outside] = walked(out[outside])
    return out.astype(np.int64)


def is_held_out(name: str, documents: np.ndarray, share: float) -> np.ndarray:
    """Which of a dataset's `documents` are kept from training; the same for every seed. bool [N]."""
    return uniform(key("held out", name), documents) < share
