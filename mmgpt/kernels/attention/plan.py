"""The block plan of attention: which blocks of queries and keys have anything to see in them, made once a step.

A block is `q_block` consecutive queries by `k_block` consecutive keys of one row. From the visibility's O(T) numbers
the plan lists the blocks in which some query sees some key, and no others, in the order of queries (the forward pass)
and in the order of keys (the backward pass). All layers and heads share it, and nothing of T x S is ever made.

Shapes: N = B T' queries of all rows, each row filled up to whole blocks, M = B S' keys likewise.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mmgpt.core.stream import Visibility

EMPTY, FULL, EDGE, MIXED = 0, 1, 2, 3
"""Classes: nothing to see; every pair is visible; intervals alone decide; islands or gaps have a say too.

An EMPTY entry stands for a block of queries (or of keys) that has no other, so that its zeros are written.
"""

CLASS_BITS, BLOCK_BITS = 2, 14
MOST_BLOCKS = 1 << BLOCK_BITS
END = (1 << (2 * BLOCK_BITS + CLASS_BITS)) - 1 + (1 << 30)
"""Sorts behind every entry."""

MOST_SIDE, LEAST_SIDE = 1024, 128
"""Sides of a block of a TPU's kernel: larger ones visit more that is not seen, smaller ones do not fill its lanes."""
MOST_ENTRIES, LAST_ENTRIES = 16384, 65536
"""Entries of a plan's list on a TPU: 64 KB of scalar memory if blocks can be larger, and 256 KB at any price."""

MOST_TURNS = 128
"""Of the loop over blocks of keys in which a plan is made: 131,072 keys in a TPU's blocks."""

FARTHEST = 1 << 29
"""An index is less, on either side."""
NOWHERE = 1 << 30
"""The base of a block of keys that is all padding: behind every index."""


class Blocks(NamedTuple):
    """Sizes of a block: `q` queries by `k` keys."""

    q: int
    k: int


def side(length: int, most: int) -> int:
    """A power of 2 from 128 to `most`, 1/8 of the length or less, so that edges cost little."""
    found = LEAST_SIDE
    while 2 * found <= most and found * 16 <= length:
        found *= 2
    return found


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A visibility laid out in blocks, and the lists of the blocks to visit.

    `start, stop, island [N]`, `key_island [M]` int32: the visibility with rows one after another and filled up.
    `base [M / k_block]`: what a block of keys adds to a key's place in it to make its index.
    `by_query [entries]`: the blocks, ascending in queries and then keys, as `query block << 16 | key block << 2 |
    class`; `by_key`: ascending in keys and then queries, as `key block << 16 | query block << 2 | class`. The first
    `count_by_query [1]` and `count_by_key [1]` of them count. `first_key [N / q_block]`: the first block of keys that a
    block of queries visits, NOWHERE if it sees nothing. `rows_by_query [N / q_block + 1]`: block i's entries are those
    from rows[i] to rows[i + 1]; `order_by_query [N / q_block]`: the blocks, those with most entries first, so that a
    device that works on many at once has short ones left in the end. `rows_by_key`, `order_by_key` likewise.
    `causal [1]` bool: whether every query sees the keys of its row up to itself, and nothing else is to be known.
    """

    start: jax.Array
    stop: jax.Array
    island: jax.Array
    key_island: jax.Array
    base: jax.Array
    by_query: jax.Array
    by_key: jax.Array
    count_by_query: jax.Array
    count_by_key: jax.Array
    first_key: jax.Array
    rows_by_query: jax.Array
    rows_by_key: jax.Array
    order_by_query: jax.Array
    order_by_key: jax.Array
    causal: jax.Array
    blocks: Blocks = dataclasses.field(metadata={"static": True})
    shape: tuple[int, int, int] = dataclasses.field(metadata={"static": True})
    """Rows, queries and keys of the visibility."""

    def any(self) -> jax.Array:
        """`[]` bool: whether any query sees any key."""
        return jnp.any(self.first_key != NOWHERE)

    def check(self, B: int, T: int, S: int) -> None:
        """Raises ValueError unless this is a plan of B rows of T queries and S keys."""
        if self.shape != (B, T, S):
            rows, queries, keys = self.shape
            raise ValueError(
                f"attention: a plan of {rows} x {queries} queries and {keys} keys for arrays of {B} x {T} and {S}; "
                "make the plan from the visibility of these arrays."
            )


def make(visibility: Visibility, blocks: Blocks) -> Plan:
    """The plan of `visibility`, on the device that holds it.

    The keys of a block that are not padding must have consecutive indices, between -2^29 and 2^29. Raises ValueError
    beyond 16,384 blocks.
    """
    (B, T), S = visibility.start.shape, visibility.index.shape[1]
    rows_q, rows_k = math.ceil(T / blocks.q), math.ceil(S / blocks.k)
    if B * max(rows_q, rows_k) > MOST_BLOCKS:
        raise ValueError(
            f"attention: {B} rows of {T} queries and {S} keys are more than {MOST_BLOCKS} blocks of {blocks}; use "
            "larger blocks or fewer rows on a device."
        )

    def filled(x: jax.Array, size: int, value: int) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)), constant_values=value)

    # No index is so far out, and sums of three such numbers are int32. A query of no island has none of padding's.
    start, stop = (jnp.clip(filled(x, blocks.q, 0), -FARTHEST, FARTHEST) for x in (visibility.start, visibility.stop))
    island = filled(jnp.maximum(visibility.island, 0), blocks.q, 0)
    index, key_island = filled(visibility.index, blocks.k, 0), filled(visibility.key_island, blocks.k, -1)
    klass, base = _classes(start, stop, island, index, key_island, blocks)
    by_query, rows_by_query = _entries(klass)
    by_key, rows_by_key = _entries(jnp.swapaxes(klass, 1, 2))
    return Plan(
        start=start.reshape(-1),
        stop=stop.reshape(-1),
        island=island.reshape(-1),
        key_island=key_island.reshape(-1),
        base=base.reshape(-1),
        by_query=by_query,
        by_key=by_key,
        count_by_query=rows_by_query[-1:],
        count_by_key=rows_by_key[-1:],
        first_key=_first(klass),
        rows_by_query=rows_by_query,
        rows_by_key=rows_by_key,
        order_by_query=_longest_first(rows_by_query),
        order_by_key=_longest_first(rows_by_key),
        causal=causal(visibility).reshape(1),
        blocks=blocks,
        shape=(B, T, S),
    )


def causal(visibility: Visibility) -> jax.Array:
    """`[]` bool: whether these numbers are those of causal rows without padding: then a query sees the keys up to it.

    Other numbers may say the same, and are told no: the answer yes is the exact one.
    """
    (_, T), S = visibility.start.shape, visibility.index.shape[1]
    if T != S:
        return jnp.zeros((), bool)
    place = jnp.arange(T, dtype=jnp.int32)[None]
    kept = (visibility.start <= 0) & (visibility.stop == place + 1)
    return jnp.all(kept & (visibility.index == place) & (visibility.key_island == 0))


def unpacked(entry: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`(first block, second block, class)` of an entry; the first is what its list ascends in."""
    return entry >> (BLOCK_BITS + CLASS_BITS), (entry >> CLASS_BITS) & (MOST_BLOCKS - 1), entry & 3


def _entries(klass_BNJ: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The list of entries in the order of N, and where each N's begin; an N with none gets an EMPTY entry."""
    B, N, J = klass_BNJ.shape
    row = jnp.arange(B, dtype=jnp.int32)[:, None, None]
    i, j = jnp.arange(N, dtype=jnp.int32)[None, :, None], jnp.arange(J, dtype=jnp.int32)[None, None, :]
    place = ((row * N + i) << (BLOCK_BITS + CLASS_BITS)) | ((row * J + j) << CLASS_BITS)
    visited = klass_BNJ != EMPTY
    lone = ~jnp.any(visited, axis=2, keepdims=True) & (j == 0)
    kept = visited | lone
    entries = jnp.sort(jnp.where(kept, place | klass_BNJ, END).reshape(-1))
    ends = jnp.cumsum(jnp.sum(kept, axis=2, dtype=jnp.int32).reshape(-1), dtype=jnp.int32)
    return entries, jnp.pad(ends, (1, 0))


def _longest_first(rows: jax.Array) -> jax.Array:
    """The blocks, those with most entries first."""
    return jnp.argsort(rows[:-1] - rows[1:]).astype(jnp.int32)


def _first(klass_BIJ: jax.Array) -> jax.Array:
    """The first block of keys that each block of queries visits, numbered through all rows."""
    B, _, J = klass_BIJ.shape
    number = jnp.arange(B * J, dtype=jnp.int32).reshape(B, 1, J)
    return jnp.min(jnp.where(klass_BIJ != EMPTY, number, NOWHERE), axis=2).reshape(-1)


def _classes(
    start: jax.Array, stop: jax.Array, island: jax.Array, index: jax.Array, key_island: jax.Array, blocks: Blocks
) -> tuple[jax.Array, jax.Array]:
    """The class of every block `[B, T'/q, S'/k]`, and each key block's base `[B, S'/k]`."""
    B, T = start.shape
    in_blocks = (B, -1, blocks.k)
    real = (key_island >= 0).reshape(in_blocks)
    common = (key_island == 0).reshape(in_blocks)
    place = jnp.arange(blocks.k, dtype=jnp.int32)[None, None, :]
    base_BJ = jnp.max(jnp.where(real, index.reshape(in_blocks) - place, jnp.iinfo(jnp.int32).min), axis=2)
    base_BJ = jnp.where(jnp.any(real, axis=2), base_BJ, NOWHERE)
    first_BJ = jnp.min(jnp.where(common, place, blocks.k), axis=2)
    last_BJ = jnp.max(jnp.where(common, place, -1), axis=2)
    run = (place >= first_BJ[:, :, None]) & (place <= last_BJ[:, :, None])
    plain = jnp.all((common == run) & (common == real))
    ends_BJ = jnp.where(last_BJ < 0, 0, last_BJ + 1)

    def with_gaps() -> jax.Array:
        """What each query sees: the first common key behind its start, and its own island's run."""
        # next[p]: the first place from p on, in the same block, of a key that every island sees.
        next_BJK = jax.lax.cummin(jnp.where(common, place, blocks.k), axis=2, reverse=True)
        after_BT = _after(start, base_BJ, next_BJK)
        low_BT, high_BT = _runs(island, index, key_island)
        low_BT, high_BT = jnp.maximum(low_BT, start), jnp.minimum(high_BT, stop - 1)

        def sees(base_B1: jax.Array, first_B1: jax.Array, _: jax.Array) -> jax.Array:
            begin = start - base_B1
            first = jnp.where(begin <= 0, first_B1, jnp.where(begin < blocks.k, after_BT, blocks.k))
            own = (low_BT <= high_BT) & (low_BT < base_B1 + blocks.k) & (high_BT >= base_B1)
            return (first < jnp.minimum(stop - base_B1, blocks.k)) | (own & (base_B1 != NOWHERE))

        return _each_key_block(sees, base_BJ, first_BJ, ends_BJ, blocks.q)

    def without_gaps() -> jax.Array:
        """Where the common keys of a block are one run, its ends decide."""

        def sees(base_B1: jax.Array, first_B1: jax.Array, end_B1: jax.Array) -> jax.Array:
            return jnp.maximum(start - base_B1, first_B1) < jnp.minimum(stop - base_B1, end_B1)

        return _each_key_block(sees, base_BJ, first_BJ, ends_BJ, blocks.q)

    visited = jax.lax.cond(plain, without_gaps, with_gaps)
    rows = (B, T // blocks.q, blocks.q)
    queries = start.reshape(rows), stop.reshape(rows), island.reshape(rows)
    full, alone = _kinds(queries, key_island.reshape(in_blocks), common, base_BJ, ends_BJ)
    klass = jnp.where(full, FULL, jnp.where(alone, EDGE, MIXED))
    return jnp.where(visited, klass, EMPTY).astype(jnp.int32), base_BJ


def _kinds(
    queries: tuple[jax.Array, jax.Array, jax.Array],
    key_island_BJK: jax.Array,
    common_BJK: jax.Array,
    base_BJ: jax.Array,
    ends_BJ: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """`[B, I, J]` each, of blocks that are visited: every pair is visible; intervals alone decide.

    `queries`: start, stop and island, `[B, I, Q]` each.
    """
    start_BIQ, stop_BIQ, island_BIQ = queries
    k_block = key_island_BJK.shape[2]
    base, end = base_BJ[:, None, :], (base_BJ + ends_BJ)[:, None, :]
    whole = jnp.all(common_BJK, axis=2)[:, None, :]
    # Full: the narrowest query sees all of it, and all its keys are of one island with all queries.
    latest, earliest = jnp.max(start_BIQ, axis=2)[:, :, None], jnp.min(stop_BIQ, axis=2)[:, :, None]
    covered = (latest <= base) & (earliest >= base + k_block)
    highest = jnp.max(key_island_BJK, axis=2, keepdims=True)
    single = jnp.all((key_island_BJK == 0) | (key_island_BJK == highest), axis=2)[:, None, :]
    lowest_query, highest_query = (f(island_BIQ, axis=2)[:, :, None] for f in (jnp.min, jnp.max))
    highest = highest[:, None, :, 0]
    same = (lowest_query == highest) & (highest_query == highest)
    # Alone: every island sees all keys, but for some at the end that lie behind what anyone asks for (a row's padding).
    asked = jnp.where(stop_BIQ > start_BIQ, stop_BIQ, jnp.iinfo(jnp.int32).min)
    place = jnp.arange(k_block, dtype=jnp.int32)[None, None, :]
    first = jnp.all(common_BJK == (place < ends_BJ[:, :, None]), axis=2)[:, None, :]
    behind = jnp.max(asked, axis=2)[:, :, None] <= end
    return covered & (whole | (single & same)), whole | (first & behind)


def _each_key_block(
    sees: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    base_BJ: jax.Array,
    first_BJ: jax.Array,
    ends_BJ: jax.Array,
    q_block: int,
) -> jax.Array:
    """`[B, T'/q, J]`: whether any query of a block sees something, one block of keys after another.

    Together they would be queries x blocks of keys in memory: 64 MB at 131,072. Of many small blocks a turn takes more.
    """

    def block(numbers: tuple[jax.Array, ...]) -> jax.Array:
        seen = sees(*(x[:, None] for x in numbers))
        return jnp.any(seen.reshape(seen.shape[0], -1, q_block), axis=2)

    numbers, many = tuple(x.T for x in (base_BJ, first_BJ, ends_BJ)), -(-base_BJ.shape[1] // MOST_TURNS)
    return jnp.moveaxis(jax.lax.map(block, numbers, batch_size=many if many > 1 else None), 0, 2)


def _after(start_BT: jax.Array, base_BJ: jax.Array, next_BJK: jax.Array) -> jax.Array:
    """`next` at each query's start, in the block of keys that holds it, `[B, T]`."""
    B, J, k_block = next_BJK.shape

    def found(j: jax.Array, at_BT: jax.Array) -> jax.Array:
        place = start_BT - base_BJ[:, j][:, None]
        return jnp.where((place >= 0) & (place < k_block), j * k_block + place, at_BT)

    at_BT = jax.lax.fori_loop(0, J, found, jnp.zeros_like(start_BT))
    return jnp.take_along_axis(next_BJK.reshape(B, -1), at_BT, axis=1)


def _runs(island_BT: jax.Array, index_BS: jax.Array, key_island_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The lowest and highest index of the keys of each query's island, `[B, T]` each; where there are none, low > high.

    Islands are sorted by number, which may be any: `(number, index)` pairs, then a search for each query.
    """
    number, index = jax.lax.sort((key_island_BS, index_BS), dimension=1, num_keys=2)
    size = number.shape[1]

    def row(number_S: jax.Array, index_S: jax.Array, island_T: jax.Array) -> tuple[jax.Array, jax.Array]:
        left = jnp.searchsorted(number_S, island_T, side="left")
        right = jnp.searchsorted(number_S, island_T, side="right")
        low, high = index_S[jnp.minimum(left, size - 1)], index_S[jnp.maximum(right - 1, 0)]
        none = (left == right) | (island_T <= 0)
        return jnp.where(none, 1, low), jnp.where(none, 0, high)

    return jax.vmap(row)(number, index, island_BT)
