"""Attention on a GPU: the forward kernel, the one that makes dq, and the one that makes dk and dv.

Shapes as in `pallas_gpu.py`; logits are in units of log 2.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from mmgpt.kernels.attention.logits import LOG2E, LOWEST, Options, capped, product
from mmgpt.kernels.attention.plan import EMPTY, FULL, Blocks, Plan, unpacked

Tiles = tuple[jax.Array, ...]
"""Some rows of K numbers, as tiles whose widths are powers of 2 (80 = 64 + 16), as Triton wants them."""


class Static(NamedTuple):
    """What the kernels are compiled for; `interpret` is what Pallas takes."""

    scale: float
    options: Options
    interpret: Any = False


class Launch(NamedTuple):
    """Warps of a program, and how many turns of its loop are under way at once; its tile: `rows` of its own block, and
    `others` of the other blocks, which it takes in a turn."""

    warps: int
    stages: int
    rows: int
    others: int


FORWARD = {96: Launch(4, 3, 128, 64), 128: Launch(8, 3, 128, 64), 256: Launch(8, 2, 64, 64)}
QUERIES = {64: Launch(4, 3, 128, 64), 128: Launch(8, 3, 128, 64), 256: Launch(8, 2, 64, 64)}
KEYS = {96: Launch(4, 3, 64, 64), 128: Launch(4, 2, 64, 64), 256: Launch(8, 2, 64, 32)}
"""By the head dim up to which they hold: on an H100 sums and logits stay in registers, and two programs of 4 warps
share a multiprocessor, so that one has products while the other has exponentials."""
SINGLE = Launch(8, 1, 32, 32)
"""In float32, which no tensor core takes and which needs twice the room."""


def _launch(table: dict[int, Launch], K: int, dtype: Any, rows: int, others: int) -> Launch:
    """The launch with tiles within blocks of `rows` and `others`."""
    found = SINGLE if dtype == jnp.float32 else table[min(most for most in table if most >= K)]
    return found._replace(rows=min(found.rows, rows), others=min(found.others, others))


def _columns(K: int) -> list[Any]:
    """The slices whose widths are powers of 2, the widest first, that make up K."""
    widths = [1 << bit for bit in reversed(range(K.bit_length())) if K >> bit & 1]
    return [pl.ds(sum(widths[:i]), width) for i, width in enumerate(widths)]


def _load(ref: Any, rows: Any, head: jax.Array) -> Tiles:
    return tuple(ref[rows, head, columns] for columns in _columns(ref.shape[2]))


def _store(ref: Any, rows: Any, head: jax.Array, tiles: Tiles) -> None:
    for columns, tile in zip(_columns(ref.shape[2]), tiles, strict=True):
        ref[rows, head, columns] = tile.astype(ref.dtype)


def _zeros(rows: int, K: int) -> Tiles:
    return tuple(jnp.zeros((rows, columns.size), jnp.float32) for columns in _columns(K))


def _dots(a: Tiles, b: Tiles) -> jax.Array:
    """The products of each row of `a` with each row of `b`."""
    first, *others = (product(x, y, 1, 1) for x, y in zip(a, b, strict=True))
    return sum(others, start=first)


def _added(sums: Tiles, weights: jax.Array, tiles: Tiles) -> Tiles:
    """The sums, and on top of them the rows of `tiles` weighed."""
    weights = weights.astype(tiles[0].dtype)
    return tuple(s + product(weights, tile, 1, 0) for s, tile in zip(sums, tiles, strict=True))


class _Lists(NamedTuple):
    """References to the plan's list in one order: blocks with the longest rows first, rows of entries, and entries."""

    order: Any
    rows: Any
    entries: Any

    def own(self, size: int, rows: int) -> tuple[jax.Array, Any]:
        """The program's block, of `size` positions, and the `rows` of it that are its tile."""
        parts = size // rows
        at = pl.program_id(1)
        block = self.order[jax.lax.div(at, parts)]
        return block, pl.ds(block * size + jax.lax.rem(at, parts) * rows, rows)

    def walk(self, block: jax.Array, turns: int, body: Callable[..., Any], sums: Any) -> Any:
        """`body(other block, class, turn, sums)` over the block's entries, `turns` times each."""
        begin, end = self.rows[block], self.rows[block + 1]
        end = jnp.where(unpacked(self.entries[begin])[2] == EMPTY, begin, end)

        def step(n: jax.Array, sums: Any) -> Any:
            at = jax.lax.div(n, turns)
            _, other, klass = unpacked(self.entries[at])
            return body(other, klass, n - at * turns, sums)

        return jax.lax.fori_loop(begin * turns, end * turns, step, sums)


class _Seen(NamedTuple):
    """References to the visibility's numbers."""

    start: Any
    stop: Any
    island: Any
    key_island: Any
    base: Any

    def part(self, key_block: jax.Array, turn: jax.Array | int, size: int, keys: int) -> tuple[Any, jax.Array]:
        """The `keys` of one turn out of a block of `size`, and what makes their places in them indices."""
        first = turn * keys
        return pl.ds(key_block * size + first, keys), self.base[key_block] + first

    def masked(self, s: jax.Array, klass: jax.Array, queries: Any, keys: Any, base: jax.Array, by: int) -> jax.Array:
        """Logits, -inf where nothing is seen; `base` makes a key's place its index; `by`: the axis of the queries."""

        def rule(s: jax.Array) -> jax.Array:
            start, stop, island = (jnp.expand_dims(x[queries], 1 - by) for x in (self.start, self.stop, self.island))
            index = jnp.expand_dims(jnp.arange(keys.size, dtype=jnp.int32), by) + base
            key_island = jnp.expand_dims(self.key_island[keys], by)
            seen = (start <= index) & (index < stop) & ((key_island == 0) | (key_island == island))
            return jnp.where(seen, s, -jnp.inf)

        return jax.lax.cond(klass == FULL, lambda s: s, rule, s)


def _logits(a: Tiles, b: Tiles, static: Static) -> tuple[jax.Array, jax.Array | None]:
    options = static.options
    return capped(_dots(a, b) * (static.scale * options.query_factor), options.soft_cap)


def _forward(*refs: Any, static: Static, launch: Launch, blocks: Blocks, shared: int) -> None:
    """One block of queries of one head."""
    lists, seen, (q, k, v, sinks, out, lse) = _Lists(*refs[:3]), _Seen(*refs[3:8]), refs[8:]
    head, (block, queries) = pl.program_id(0), lists.own(blocks.q, launch.rows)
    of_keys = jax.lax.div(head, shared)
    q_tiles = _load(q, queries, head)
    options = static.options

    def visit(key_block: jax.Array, klass: jax.Array, turn: jax.Array, sums: Any) -> Any:
        acc, high, total = sums
        keys, base = seen.part(key_block, turn, blocks.k, launch.others)
        s, _ = _logits(q_tiles, _load(k, keys, of_keys), static)
        s = seen.masked(s, klass, queries, keys, base, 0)
        if not options.bounded:
            now = jnp.maximum(high, jnp.max(s, axis=1))
            fade = jnp.exp2(high - now)
            s, total, high = s - now[:, None], total * fade, now
            acc = tuple(a * fade[:, None] for a in acc)
        p = jnp.exp2(s)
        return _added(acc, p, _load(v, keys, of_keys)), high, total + jnp.sum(p, axis=1)

    high = jnp.full((launch.rows,), LOWEST, jnp.float32)
    total = jnp.zeros((launch.rows,), jnp.float32)
    if options.sinks:
        sink = sinks[head] * LOG2E
        high = jnp.maximum(high, sink)
        total = jnp.exp2(sink - high)
    acc, high, total = lists.walk(
        block, blocks.k // launch.others, visit, (_zeros(launch.rows, q.shape[2]), high, total)
    )
    empty = total == 0.0
    total = jnp.where(empty, 1.0, total)
    _store(out, queries, head, tuple(a / total[:, None] for a in acc))
    shift = 0.0 if options.bounded else high
    lse[head, queries] = jnp.where(empty, -jnp.inf, (jnp.log2(total) + shift) * (1.0 / LOG2E))


def _backward_queries(*refs: Any, static: Static, launch: Launch, blocks: Blocks, shared: int) -> None:
    """dq of one block of queries of one head."""
    lists, seen, (q, k, v, do, lse, di, dq) = _Lists(*refs[:3]), _Seen(*refs[3:8]), refs[8:]
    head, (block, queries) = pl.program_id(0), lists.own(blocks.q, launch.rows)
    of_keys = jax.lax.div(head, shared)
    q_tiles, do_tiles = _load(q, queries, head), _load(do, queries, head)
    log2_sum, less = lse[head, queries][:, None], di[head, queries][:, None]

    def visit(key_block: jax.Array, klass: jax.Array, turn: jax.Array, sums: Tiles) -> Tiles:
        keys, base = seen.part(key_block, turn, blocks.k, launch.others)
        k_tiles = _load(k, keys, of_keys)
        s, slope = _logits(q_tiles, k_tiles, static)
        p = jnp.exp2(seen.masked(s, klass, queries, keys, base, 0) - log2_sum)
        ds = p * (_dots(do_tiles, _load(v, keys, of_keys)) - less)
        return _added(sums, ds if slope is None else ds * slope, k_tiles)

    sums = lists.walk(block, blocks.k // launch.others, visit, _zeros(launch.rows, q.shape[2]))
    _store(dq, queries, head, tuple(x * static.scale for x in sums))


def _backward_keys(*refs: Any, static: Static, launch: Launch, blocks: Blocks, shared: int) -> None:
    """dk and dv of one block of keys of one key head: what all query heads that share it give."""
    lists, seen, (q, k, v, do, lse, di, dk, dv) = _Lists(*refs[:3]), _Seen(*refs[3:8]), refs[8:]
    of_keys, (block, keys) = pl.program_id(0), lists.own(blocks.k, launch.rows)
    base = seen.base[block] + (keys.start - block * blocks.k)
    parts = blocks.q // launch.others
    k_tiles, v_tiles = _load(k, keys, of_keys), _load(v, keys, of_keys)

    def visit(query_block: jax.Array, klass: jax.Array, turn: jax.Array, sums: tuple[Tiles, Tiles]) -> Any:
        head = of_keys * shared + jax.lax.div(turn, parts)
        queries = pl.ds(query_block * blocks.q + jax.lax.rem(turn, parts) * launch.others, launch.others)
        q_tiles, do_tiles = _load(q, queries, head), _load(do, queries, head)
        # Logits lie transposed here: both sums then take the weights as they are.
        s, slope = _logits(k_tiles, q_tiles, static)
        p = jnp.exp2(seen.masked(s, klass, queries, keys, base, 1) - lse[head, queries][None, :])
        of_v = _added(sums[1], p, do_tiles)
        ds = p * (_dots(v_tiles, do_tiles) - di[head, queries][None, :])
        return _added(sums[0], ds if slope is None else ds * slope, q_tiles), of_v

    zeros = _zeros(launch.rows, k.shape[2])
    of_k, of_v = lists.walk(block, shared * parts, visit, (zeros, zeros))
    _store(dk, keys, of_keys, tuple(x * static.scale for x in of_k))
    _store(dv, keys, of_keys, of_v)


class _Call(NamedTuple):
    """What all three kernels are called with."""

    plan: Plan
    static: Static
    heads: int
    shared: int
    head_dim: int

    @classmethod
    def of(cls, q_NHK: jax.Array, k_MGK: jax.Array, plan: Plan, static: Static) -> "_Call":
        (_, H, K), G = q_NHK.shape, k_MGK.shape[1]
        return cls(plan, static, H, H // G, K)

    def __call__(self, kernel: Any, table: dict[int, Launch], out: Any, *arrays: jax.Array, by_key: bool) -> Any:
        """Runs a program for each head and block, those with most entries first."""
        plan = self.plan
        lists = (
            (plan.order_by_key, plan.rows_by_key, plan.by_key)
            if by_key
            else (plan.order_by_query, plan.rows_by_query, plan.by_query)
        )
        seen = plan.start, plan.stop, plan.island, plan.key_island, plan.base
        own, other = reversed(plan.blocks) if by_key else plan.blocks
        launch = _launch(table, self.head_dim, arrays[0].dtype, own, other)
        return pl.pallas_call(
            functools.partial(kernel, static=self.static, launch=launch, blocks=plan.blocks, shared=self.shared),
            grid=(self.heads // self.shared if by_key else self.heads, lists[0].shape[0] * (own // launch.rows)),
            out_shape=out,
            compiler_params=triton.CompilerParams(num_warps=launch.warps, num_stages=launch.stages),
            interpret=self.static.interpret,
            name=f"attention{kernel.__name__}",
        )(*lists, *seen, *arrays)


def forward(
    q_NHK: jax.Array, k_MGK: jax.Array, v_MGK: jax.Array, sinks_H: jax.Array, plan: Plan, static: Static
) -> tuple[jax.Array, jax.Array]:
    """`(out [N, H, K] in v's dtype, lse [H, N] float32)`; zeros and -inf where nothing is seen."""
    out = (
        jax.ShapeDtypeStruct(q_NHK.shape, v_MGK.dtype),
        jax.ShapeDtypeStruct((q_NHK.shape[1], q_NHK.shape[0]), jnp.float32),
    )
    call = _Call.of(q_NHK, k_MGK, plan, static)
    return call(_forward, FORWARD, out, q_NHK, k_MGK, v_MGK, sinks_H, by_key=False)


def backward(
    q_NHK: jax.Array,
    k_MGK: jax.Array,
    v_MGK: jax.Array,
    do_NHK: jax.Array,
    log2_sum_HN: jax.Array,
    di_HN: jax.Array,
    plan: Plan,
    static: Static,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`dq, dk, dv` in the dtypes of their arrays.

    `log2_sum` is lse in units of log 2, UNSEEN for a query that sees nothing; `di` what its output moves by along its
    gradient, less lse's gradient.
    """
    arrays = q_NHK, k_MGK, v_MGK, do_NHK, log2_sum_HN, di_HN
    like_q, like_k, like_v = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays[:3])
    call = _Call.of(q_NHK, k_MGK, plan, static)
    dq = call(_backward_queries, QUERIES, like_q, *arrays, by_key=False)
    return dq, *call(_backward_keys, KEYS, (like_k, like_v), *arrays, by_key=True)
