"""Attention on a TPU: the forward kernel over the entries of a block plan; `pallas_tpu_backward.py` has the other.

Logits lie transposed, keys on sublanes and queries on lanes. What a query has one of (its maximum, its sum, its
interval) is then a row of lanes, which is broadcast for nothing, a reduction over keys adds registers, and no matmul
of either pass needs a transposed operand but `v`, which XLA turns round, and `k`, turned once a row of the list.

A step of the grid is one entry of the plan: `q_block` queries of all R query heads of a key head, and `k_block` keys.
Shapes: G key heads, R = H / G, N queries and M keys of all rows, filled up to whole blocks, K head dim. Queries come
multiplied with scale x log2(e): logits are in units of log 2 (with a soft cap: with scale / cap).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mmgpt.kernels.attention.logits import LOG2E, LOWEST, Options, capped, product
from mmgpt.kernels.attention.plan import EDGE, FULL, MIXED, Plan, unpacked

LANES = 128
VMEM_LIMIT = 60 * 2**20
BOUNDED_CHUNK, ONLINE_CHUNK = 256, 512
"""Queries whose logits are made ahead of being weighed: the fastest of 128 to 1,024 by the schedules of v5p and v7x."""
NO_CLASS = -1
"""What no block is of."""
TOGETHER = 2048
"""Queries of the heads that share a schedule, at most: more gain nothing, and spill registers."""


class Mask(NamedTuple):
    """References to the visibility of one block: rows `start, stop, island [1, q]`, the keys' islands `[k, 128]`."""

    start: Any
    stop: Any
    island: Any
    keys: Any

    def fill(self, key_island: Any) -> None:
        """Puts the keys' islands on sublanes, the same in each lane."""
        self.keys[...] = jnp.transpose(jnp.broadcast_to(key_island[...], self.keys.shape[::-1]))

    def visible(self, klass: int, base: jax.Array, shape: tuple[int, ...], columns: Any) -> jax.Array:
        """The rule on all keys of the block and the queries of `columns`."""
        start = self.start[:, columns]
        place = jax.lax.broadcasted_iota(jnp.int32, shape, 0) - (start - base)
        length = jnp.maximum(self.stop[:, columns] - start, 0)
        # As unsigned numbers, places before the start are beyond every length: one comparison does for two.
        inside = jax.lax.bitcast_convert_type(place, jnp.uint32) < jax.lax.bitcast_convert_type(length, jnp.uint32)
        if klass == MIXED:
            key = jnp.tile(self.keys[...], (1, shape[1] // LANES))
            inside &= (key == 0) | (key == self.island[:, columns])
        return inside


def ends(entries: Any) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """`(first block, second block, class, begins a row of blocks, ends it)` of the grid's entry."""
    n, last = pl.program_id(1), pl.num_programs(1) - 1
    at, other, klass = unpacked(entries[n])
    begins = (n == 0) | (unpacked(entries[jnp.maximum(n - 1, 0)])[0] != at)
    finishes = (n == last) | (unpacked(entries[jnp.minimum(n + 1, last)])[0] != at)
    return at, other, klass, begins, finishes


def each_head(heads: int, body: Any) -> None:
    """`body(head)` for every head, one after another."""
    jax.lax.fori_loop(0, heads, lambda r, _: body(r), None)


def together(heads: int, width: int) -> int:
    """Heads that share a schedule: what one waits for is hidden behind another's products."""
    return next(n for n in (4, 2, 1) if heads % n == 0 and (n == 1 or n * width <= TOGETHER))


def chunks(width: int, chunk: int) -> list[Any]:
    """`width` queries in parts of `chunk`, or of half as many until they divide."""
    while width % chunk:
        chunk //= 2
    return [pl.ds(c, chunk) for c in range(0, width, chunk)]


def rows_of(plan: Plan) -> tuple[jax.Array, ...]:
    """The visibility's numbers as rows of lanes: `start, stop, island, key_island`."""
    return tuple(x[None] for x in (plan.start, plan.stop, plan.island, plan.key_island))


def of_head(block: Any, r: jax.Array, head_dim: int) -> Any:
    """The part `[q, K]` that one head has of a block `[1, R, q, K]`, or `[q, R * K]` of heads side by side."""
    if len(block.shape) == 4:
        return block.at[0, r]
    return block.at[:, pl.ds(pl.multiple_of(r * head_dim, LANES), head_dim)]


class Specs(NamedTuple):
    """What of each array a step of the grid (key head, entry) has in VMEM.

    `row` of a query's number, `heads [1, R, q, K]`, `flat [q, R * K]` of heads side by side, `sums [1, R, 1, q]`,
    `keys [1, k, K]`, `turned [1, K, k]`, and `key_row` of a key's number.
    """

    row: pl.BlockSpec
    heads: pl.BlockSpec
    flat: pl.BlockSpec
    sums: pl.BlockSpec
    keys: pl.BlockSpec
    turned: pl.BlockSpec
    key_row: pl.BlockSpec

    @classmethod
    def of(cls, heads: int, head_dim: int, plan: Plan, *, by_key: bool) -> "Specs":
        """The specs where the entries are the first of the scalars, in the order of queries or of keys."""
        q, k = plan.blocks

        def query(n: jax.Array, entries: Any, *_: Any) -> jax.Array:
            return unpacked(entries[n])[1 if by_key else 0]

        def key(n: jax.Array, entries: Any, *_: Any) -> jax.Array:
            return unpacked(entries[n])[0 if by_key else 1]

        return cls(
            row=pl.BlockSpec((1, q), lambda g, *n: (0, query(*n))),
            heads=pl.BlockSpec((1, heads, q, head_dim), lambda g, *n: (g, 0, query(*n), 0)),
            flat=pl.BlockSpec((q, heads * head_dim), lambda g, *n: (query(*n), g)),
            sums=pl.BlockSpec((1, heads, 1, q), lambda g, *n: (g, 0, 0, query(*n))),
            keys=pl.BlockSpec((1, k, head_dim), lambda g, *n: (g, key(*n), 0)),
            turned=pl.BlockSpec((1, head_dim, k), lambda g, *n: (g, 0, key(*n))),
            key_row=pl.BlockSpec((1, k), lambda g, *n: (0, key(*n))),
        )


PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT)
"""Key heads are shared out between the cores of a chip."""


class _Block(NamedTuple):
    """References to one block of queries, what it has gathered, and a block of keys."""

    q: Any
    k: Any
    vt: Any
    mask: Mask
    base: jax.Array
    acc: Any
    high: Any
    sums: Any
    waiting: Any
    options: Options

    def begin(self, sinks: Any, bounded: jax.Array) -> None:
        self.acc[...] = jnp.zeros_like(self.acc)
        self.sums[...] = jnp.full_like(self.sums, 1.0 if self.options.sinks else 0.0)
        self.high[...] = jnp.full_like(self.high, jnp.where(bounded, 0.0, LOWEST))
        for r in range(self.q.shape[1]) if self.options.sinks else ():
            self.high[r] = jnp.full(self.high.shape[1:], sinks[pl.program_id(0), r] * LOG2E, jnp.float32)

    def logits(self, klass: int, r: jax.Array, here: Any) -> jax.Array:
        s, _ = capped(product(self.k[0], self.q[0, r, here, :], 1, 1), self.options.soft_cap)
        if klass == FULL:
            return s
        return jnp.where(self.mask.visible(klass, self.base, s.shape, here), s, -jnp.inf)

    def ask(self, klass: int, r: jax.Array, here: Any, buffer: int) -> jax.Array | None:
        """Makes the logits of some queries, and their maximum where it is needed."""
        s = self.logits(klass, r, here)
        self.waiting[buffer] = s
        return None if self.options.bounded else jnp.max(s, axis=0, keepdims=True)

    def weigh(self, s: jax.Array, r: jax.Array, here: Any, highest: jax.Array | None) -> None:
        """Adds the values, weighed with exp2(s), to what the queries have gathered."""
        total, seen = self.sums[r, :, here], self.acc[r, :, here]
        if highest is not None:
            before = self.high[r, :, here]
            now = jnp.maximum(before, highest)
            fade = jnp.exp2(before - now)
            self.high[r, :, here] = now
            s, total, seen = s - now, total * fade, seen * fade
        p = jnp.exp2(s)
        self.sums[r, :, here] = total + jnp.sum(p, axis=0, keepdims=True)
        self.acc[r, :, here] = seen + product(self.vt[0], p.astype(self.vt.dtype), 1, 0)

    def attend(self, klass: int, heads: list[jax.Array]) -> None:
        if self.options.bounded and klass == FULL:
            for r in heads:
                self.weigh(self.logits(klass, r, slice(None)), r, slice(None), None)
            return
        # The next chunk's logits are asked for before this one's are weighed, so that the MXU always has a product
        # that waits for no maximum and no mask.
        parts = [(r, here) for r in heads for here in chunks(self.q.shape[2], self.waiting.shape[2])]
        highest = self.ask(klass, *parts[0], 0)
        for i, part in enumerate(parts):
            following = self.ask(klass, *parts[i + 1], (i + 1) % 2) if i + 1 < len(parts) else None
            self.weigh(self.waiting[i % 2], *part, highest)
            highest = following

    def finish(self, out: Any, lse: Any, r: jax.Array) -> None:
        empty = self.sums[r] == 0.0
        total = jnp.where(empty, 1.0, self.sums[r])
        of_head(out, r, self.acc.shape[1])[...] = jnp.transpose((self.acc[r] / total).astype(out.dtype))
        lse[0, r] = jnp.where(empty, -jnp.inf, (jnp.log2(total) + self.high[r]) * (1.0 / LOG2E))


def each_class(klass: jax.Array, mask: Mask, key_island: Any, heads: int, width: int, body: Any) -> None:
    """`body(class, some heads)` until all heads are done, compiled for each class of blocks by itself."""
    many = together(heads, width)
    for each in (FULL, EDGE, MIXED):

        @pl.when(klass == each)
        def _(each: int = each) -> None:
            if each == MIXED:
                mask.fill(key_island)
            each_head(heads // many, lambda n: body(each, [n * many + i for i in range(many)]))


def _kernel(*refs: Any, options: Options) -> None:
    entries, base, bounded, q, k, vt, start, stop, island, key_island, sinks = refs[:11]
    out, lse, acc, high, sums, keys, waiting = refs[11:]
    _, key_block, klass, begins, finishes = ends(entries)
    mask = Mask(start, stop, island, keys)
    block = _Block(q, k, vt, mask, base[key_block], acc, high, sums, waiting, options)
    pl.when(begins)(lambda: block.begin(sinks, bounded[0] != 0))
    for said in (True, False) if options.bounded is None else ():
        known = block._replace(options=options._replace(bounded=said))
        here = jnp.where((bounded[0] != 0) == said, klass, NO_CLASS)
        each_class(here, mask, key_island, q.shape[1], q.shape[2], known.attend)
    if options.bounded is not None:
        each_class(klass, mask, key_island, q.shape[1], q.shape[2], block.attend)
    pl.when(finishes)(lambda: each_head(q.shape[1], functools.partial(block.finish, out, lse)))


def forward(
    q_GRNK: jax.Array,
    k_GMK: jax.Array,
    v_GMK: jax.Array,
    sinks_GR: jax.Array,
    plan: Plan,
    options: Options,
    bounded: jax.Array | None = None,
    *,
    flat: bool = False,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """`(out [G, R, N, K] in v's dtype, lse [G, R, 1, N] float32)`; zeros and -inf where nothing is seen.

    `bounded []` says it of the logits where the options leave it open; the kernel then holds the bodies of both.
    `flat`: out is `[N, G * R * K]`, as a projection takes it. K is then a multiple of LANES.
    """
    G, R, N, K = q_GRNK.shape
    bq, bk = plan.blocks
    waiting = chunks(bq, BOUNDED_CHUNK if options.bounded else ONLINE_CHUNK)[0].size
    at = Specs.of(R, K, plan, by_key=False)
    rows = (at.row, at.row, at.row, at.key_row)
    said = jnp.reshape(jnp.asarray(options.bounded if bounded is None else bounded, jnp.int32), (1,))
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(G, plan.count_by_query[0]),
        in_specs=[at.heads, at.keys, at.turned, *rows, pl.BlockSpec(memory_space=pltpu.SMEM)],
        out_specs=[at.flat if flat else at.heads, at.sums],
        scratch_shapes=[
            pltpu.VMEM((R, K, bq), jnp.float32),
            pltpu.VMEM((R, 1, bq), jnp.float32),
            pltpu.VMEM((R, 1, bq), jnp.float32),
            pltpu.VMEM((bk, LANES), jnp.int32),
            pltpu.VMEM((2, bk, waiting), jnp.float32),
        ],
    )
    return pl.pallas_call(
        functools.partial(_kernel, options=options),
        grid_spec=grid,
        out_shape=[
            jax.ShapeDtypeStruct((N, G * R * K) if flat else (G, R, N, K), v_GMK.dtype),
            jax.ShapeDtypeStruct((G, R, 1, N), jnp.float32),
        ],
        compiler_params=PARAMS,
        name="attention_forward",
        interpret=interpret,
    )(plan.by_query, plan.base, said, q_GRNK, k_GMK, jnp.swapaxes(v_GMK, 1, 2), *rows_of(plan), sinks_GR)
