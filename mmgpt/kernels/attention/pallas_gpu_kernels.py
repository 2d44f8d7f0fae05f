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
    """Warps of a program, and how many turns of its loop are loaded ahead."""

    warps: int
    stages: int


FORWARD = {80: Launch(4, 3), 128: Launch(8, 3), 256: Launch(8, 2)}
QUERIES = {64: Launch(4, 3), 128: Launch(8, 3), 256: Launch(8, 2)}
KEYS = {64: Launch(4, 2), 128: Launch(8, 2), 256: Launch(8, 2)}
"""By the head dim up to which they hold: what the registers and the shared memory of an H100 have room for
(docs/attention.md)."""


def _launch(table: dict[int, Launch], K: int, dtype: Any) -> triton.CompilerParams:
    warps, stages = table[min(most for most in table if most >= K)]
    # float32 takes twice the room.
    return triton.CompilerParams(num_warps=warps, num_stages=1 if dtype == jnp.float32 else stages)


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

    def masked(
        self, s: jax.Array, klass: jax.Array, queries: Any, key_block: jax.Array, keys: Any, by: int
    ) -> jax.Array:
        """Logits, -inf where nothing is seen; `by`: the axis that queries lie on."""

        def rule(s: jax.Array) -> jax.Array:
            start, stop, island = (jnp.expand_dims(x[queries], 1 - by) for x in (self.start, self.stop, self.island))
            place = jnp.expand_dims(jnp.arange(keys.size, dtype=jnp.int32), by)
            index = place + self.base[key_block]
            key_island = jnp.expand_dims(self.key_island[keys], by)
            seen = (start <= index) & (index < stop) & ((key_island == 0) | (key_island == island))
            return jnp.where(seen, s, -jnp.inf)

        return jax.lax.cond(klass == FULL, lambda s: s, rule, s)


def _logits(a: Tiles, b: Tiles, static: Static) -> tuple[jax.Array, jax.Array | None]:
    options = static.options
    return capped(_dots(a, b) * (static.scale * options.query_factor), options.soft_cap)


def _forward(*refs: Any, static: Static, blocks: Blocks, shared: int) -> None:
    """One block of queries of one head."""
    lists, seen, (q, k, v, sinks, out, lse) = _Lists(*refs[:3]), _Seen(*refs[3:8]), refs[8:]
    head, block = pl.program_id(0), refs[0][pl.program_id(1)]
    bq, bk = blocks
    of_keys = jax.lax.div(head, shared)
    queries = pl.ds(block * bq, bq)
    q_tiles = _load(q, queries, head)
    options = static.options

    def visit(key_block: jax.Array, klass: jax.Array, _: Any, sums: Any) -> Any:
        acc, high, total = sums
        keys = pl.ds(key_block * bk, bk)
        s, _ = _logits(q_tiles, _load(k, keys, of_keys), static)
        s = seen.masked(s, klass, queries, key_block, keys, 0)
        if not options.bounded:
            now = jnp.maximum(high, jnp.max(s, axis=1))
            fade = jnp.exp2(high - now)
            s, total, high = s - now[:, None], total * fade, now
            acc = tuple(a * fade[:, None] for a in acc)
        p = jnp.exp2(s)
        return _added(acc, p, _load(v, keys, of_keys)), high, total + jnp.sum(p, axis=1)

    high = jnp.full((bq,), LOWEST, jnp.float32)
    total = jnp.zeros((bq,), jnp.float32)
    if options.sinks:
        sink = sinks[head] * LOG2E
        high = jnp.maximum(high, sink)
        total = jnp.exp2(sink - high)
    acc, high, total = lists.walk(block, 1, visit, (_zeros(bq, q.shape[2]), high, total))
    empty = total == 0.0
    total = jnp.where(empty, 1.0, total)
    _store(out, queries, head, tuple(a / total[:, None] for a in acc))
    shift = 0.0 if options.bounded else high
    lse[head, queries] = jnp.where(empty, -jnp.inf, (jnp.log2(total) + shift) * (1.0 / LOG2E))


def _backward_queries(*refs: Any, static: Static, blocks: Blocks, shared: int) -> None:
    """dq of one block of queries of one head."""
    lists, seen, (q, k, v, do, lse, di, dq) = _Lists(*refs[:3]), _Seen(*refs[3:8]), refs[8:]
    head, block = pl.program_id(0), refs[0][pl.program_id(1)]
    bq, bk = blocks
    of_keys = jax.lax.div(head, shared)
    queries = pl.ds(block * bq, bq)
    q_tiles, do_tiles = _load(q, queries, head), _load(do, queries, head)
    log2_sum, less = lse[head, queries][:, None], di[head, queries][:, None]

    def visit(key_block: jax.Array, klass: jax.Array, _: Any, sums: Tiles) -> Tiles:
        keys = pl.ds(key_block * bk, bk)
        k_tiles = _load(k, keys, of_keys)
        s, slope = _logits(q_tiles, k_tiles, static)
        p = jnp.exp2(seen.masked(s, klass, queries, key_block, keys, 0) - log2_sum)
        ds = p * (_dots(do_tiles, _load(v, keys, of_keys)) - less)
        return _added(sums, ds if slope is None else ds * slope, k_tiles)

    sums = lists.walk(block, 1, visit, _zeros(bq, q.shape[2]))
    _store(dq, queries, head, tuple(x * static.scale for x in sums))


def _backward_keys(*refs: Any, static: Static, blocks: Blocks, shared: int) -> None:
    """dk and dv of one block of keys of one key head: what all query heads that share it give."""
    lists, seen, (q, k, v, do, lse, di, dk, dv) = _Lists(*refs[:3]), _Seen(*refs[3:8]), refs[8:]
    of_keys, block = pl.program_id(0), refs[0][pl.program_id(1)]
    bq, bk = blocks
    keys = pl.ds(block * bk, bk)
    k_tiles, v_tiles = _load(k, keys, of_keys), _load(v, keys, of_keys)

    def visit(query_block: jax.Array, klass: jax.Array, turn: jax.Array, sums: tuple[Tiles, Tiles]) -> Any:
        head, queries = of_keys * shared + turn, pl.ds(query_block * bq, bq)
        q_tiles, do_tiles = _load(q, queries, head), _load(do, queries, head)
        # Logits lie transposed here: both sums then take the weights as they are.
        s, slope = _logits(k_tiles, q_tiles, static)
        p = jnp.exp2(seen.masked(s, klass, queries, block, keys, 1) - lse[head, queries][None, :])
        of_v = _added(sums[1], p, do_tiles)
        ds = p * (_dots(v_tiles, do_tiles) - di[head, queries][None, :])
        return _added(sums[0], ds if slope is None else ds * slope, q_tiles), of_v

    zeros = _zeros(bk, k.shape[2])
    of_k, of_v = lists.walk(block, shared, visit, (zeros, zeros))
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
        return pl.pallas_call(
            functools.partial(kernel, static=self.static, blocks=plan.blocks, shared=self.shared),
            grid=(self.heads // self.shared if by_key else self.heads, lists[0].shape[0]),
            out_shape=out,
            compiler_params=_launch(table, self.head_dim, arrays[0].dtype),
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
