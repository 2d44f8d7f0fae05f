"""The backward pass of attention on a TPU: all three gradients in one kernel, in the order of keys.

`dk` and `dv` of a block of keys gather in VMEM while its blocks of queries pass. `dq` gathers in HBM: each block of
queries comes to VMEM, is added to and goes back, while other blocks are worked on (`_Slots`). Shapes as in
`pallas_tpu_forward.py`.

Two small kernels go before and after it: `output_sums`, and `turned_back`. XLA would turn arrays round in between.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mmgpt.kernels.attention.logits import Options, capped, product
from mmgpt.kernels.attention.pallas_tpu_forward import (
    LANES,
    PARAMS,
    VMEM_LIMIT,
    Mask,
    Specs,
    chunks,
    each_class,
    each_head,
    ends,
    of_head,
    rows_of,
)
from mmgpt.kernels.attention.plan import EMPTY, FULL, NOWHERE, Plan, unpacked

RING = 4
"""Blocks of queries whose dq is in VMEM: documents of up to so many blocks never read it back."""
CHUNK, MASKED_CHUNK = 512, 256
"""Queries in one product of full blocks, and of blocks whose weights are masked ahead: the fastest by the schedules."""

TENANT, LOADING, WRITING = 0, 1, 2


class _Slots(NamedTuple):
    """dq of the blocks of queries at hand: block i lies in slot i mod RING, and is written out after each use.

    `state [3, RING]` in SMEM: the block in each slot, whether it is being loaded, whether it is being written.
    """

    dq: Any
    slots: Any
    state: Any
    loaded: Any
    written: Any
    first_key: Any

    def copy(self, block: jax.Array, out: bool) -> Any:
        slot, width = block % RING, self.slots.shape[-1]
        here = self.slots.at[slot]
        there = self.dq.at[pl.program_id(0), :, :, pl.ds(pl.multiple_of(block * width, width), width)]
        if out:
            return pltpu.make_async_copy(here, there, self.written.at[slot])
        return pltpu.make_async_copy(there, here, self.loaded.at[slot])

    def reset(self) -> None:
        for slot in range(RING):
            self.state[TENANT, slot] = -1
            self.state[LOADING, slot] = 0
            self.state[WRITING, slot] = 0

    def settle(self, slot: Any) -> None:
        """Waits until the slot is written."""

        @pl.when(self.state[WRITING, slot] == 1)
        def _():
            self.copy(self.state[TENANT, slot], out=True).wait()
            self.state[WRITING, slot] = 0

    def take(self, block: jax.Array, key_block: jax.Array) -> None:
        """Gives the block its slot, with zeros at its first visit; else what it has so far begins to load."""
        slot = block % RING

        @pl.when(self.state[TENANT, slot] != block)
        def _():
            self.settle(slot)
            self.state[TENANT, slot] = block
            fresh = self.first_key[block] == key_block

            @pl.when(fresh)
            def _():
                self.slots[slot] = jnp.zeros(self.slots.shape[1:], self.slots.dtype)

            @pl.when(jnp.logical_not(fresh))
            def _():
                self.copy(block, out=False).start()
                self.state[LOADING, slot] = 1

    def ready(self, block: jax.Array, key_block: jax.Array) -> None:
        """Waits until the block may be added to."""
        slot = block % RING
        self.take(block, key_block)

        @pl.when(self.state[LOADING, slot] == 1)
        def _():
            self.copy(block, out=False).wait()
            self.state[LOADING, slot] = 0

        self.settle(slot)

    def write(self, block: jax.Array) -> None:
        self.copy(block, out=True).start()
        self.state[WRITING, block % RING] = 1


def _around(ring: _Slots, entries: Any, work: Any) -> None:
    """`work()` on this entry, with its dq at hand, the next one's on the way, and all of it written in the end."""
    n, last = pl.program_id(1), pl.num_programs(1) - 1
    key_block, block, klass = unpacked(entries[n])
    next_key, next_block, next_class = unpacked(entries[jnp.minimum(n + 1, last)])
    goes_on = (n < last) & (next_class != EMPTY)

    pl.when(n == 0)(ring.reset)
    pl.when(klass != EMPTY)(lambda: ring.ready(block, key_block))
    # A block that needs this one's slot waits for its turn.
    pl.when(goes_on & (next_block % RING != block % RING))(lambda: ring.take(next_block, next_key))
    work()
    pl.when((klass != EMPTY) & ~(goes_on & (next_block == block)))(lambda: ring.write(block))

    @pl.when(n == last)
    def _():
        for slot in range(RING):
            ring.settle(slot)


class _Block(NamedTuple):
    """References to one block of queries and one of keys, and the sums of their gradients."""

    q: Any
    k: Any
    kt: Any
    v: Any
    do: Any
    lse: Any
    di: Any
    mask: Mask
    base: jax.Array
    dq: Any
    dk: Any
    dv: Any
    waiting: Any
    soft_cap: float | None

    def weights(self, klass: int, r: jax.Array, here: Any) -> tuple[jax.Array, jax.Array | None]:
        s, slope = capped(product(self.k[0], self.q[0, r, here, :], 1, 1), self.soft_cap)
        p = jnp.exp2(s - self.lse[0, r, :, here])
        if klass != FULL:
            p = jnp.where(self.mask.visible(klass, self.base, p.shape, here), p, 0.0)
        return p, slope

    def differentiate(self, p: jax.Array, slope: jax.Array | None, r: jax.Array, here: Any) -> None:
        do, q = of_head(self.do, r, self.q.shape[3])[here, :], self.q[0, r, here, :]
        self.dv[...] += product(p.astype(do.dtype), do, 1, 0)
        ds = p * (product(self.v[0], do, 1, 1) - self.di[0, r, :, here])
        ds = (ds if slope is None else ds * slope).astype(q.dtype)
        self.dk[...] += product(ds, q, 1, 0)
        self.dq[r, :, here] += product(self.kt[...], ds, 1, 0)

    def visit(self, klass: int, heads: list[jax.Array]) -> None:
        width = self.q.shape[2]
        if klass == FULL:
            for r in heads:
                for here in chunks(width, CHUNK):
                    self.differentiate(*self.weights(klass, r, here), r, here)
            return
        # Masked weights are made one chunk ahead: the other four products then never wait for a mask.
        parts = [(r, here) for r in heads for here in chunks(width, self.waiting.shape[2])]
        self.waiting[0], slope = self.weights(klass, *parts[0])
        for i, part in enumerate(parts):
            following = None
            if i + 1 < len(parts):
                self.waiting[(i + 1) % 2], following = self.weights(klass, *parts[i + 1])
            self.differentiate(self.waiting[i % 2], slope, *part)
            slope = following


def _kernel(*refs: Any, options: Options) -> None:
    entries, base, first_key, q, k, v, do, lse, di, start, stop, island, key_island = refs[:13]
    dq, dk, dv, kt, dk_sum, dv_sum, slots, keys, waiting, state, loaded, written = refs[13:]
    key_block, query_block, klass, begins, finishes = ends(entries)
    mask = Mask(start, stop, island, keys)
    of_queries = slots.at[query_block % RING]
    block = _Block(
        *(q, k, kt, v, do, lse, di, mask, base[key_block]),
        *(of_queries, dk_sum, dv_sum, waiting, options.soft_cap),
    )

    @pl.when(begins)
    def _():
        kt[...] = jnp.transpose(k[0])
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    def work() -> None:
        each_class(klass, mask, key_island, q.shape[1], q.shape[2], block.visit)

    _around(_Slots(dq, slots, state, loaded, written, first_key), entries, work)

    @pl.when(finishes)
    def _():
        dk[0] = (dk_sum[...] * (1.0 / options.query_factor)).astype(dk.dtype)
        dv[0] = dv_sum[...].astype(dv.dtype)


def backward(
    q_GRNK: jax.Array,
    k_GMK: jax.Array,
    v_GMK: jax.Array,
    do: jax.Array,
    lse_GR1N: jax.Array,
    di_GR1N: jax.Array,
    plan: Plan,
    options: Options,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`(dq [G, R, K, N] float32, dk, dv [G, M, K])`; dq lacks the scale, and is undefined in blocks that see nothing.

    `do [G, R, N, K]`, or `[N, G * R * K]` with K a multiple of LANES.
    `lse` in units of log 2, UNSEEN where nothing is seen; `di` the sum of do x out of each query, less lse's gradient.
    """
    G, R, N, K = q_GRNK.shape
    bq, bk = plan.blocks
    at = Specs.of(R, K, plan, by_key=True)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(G, plan.count_by_key[0]),
        in_specs=[
            *(at.heads, at.keys, at.keys, at.heads if do.ndim == 4 else at.flat, at.sums, at.sums),
            *(at.row, at.row, at.row, at.key_row),
        ],
        out_specs=[pl.BlockSpec(memory_space=pl.ANY), at.keys, at.keys],
        scratch_shapes=[
            pltpu.VMEM((K, bk), k_GMK.dtype),
            pltpu.VMEM((bk, K), jnp.float32),
            pltpu.VMEM((bk, K), jnp.float32),
            pltpu.VMEM((RING, R, K, bq), jnp.float32),
            pltpu.VMEM((bk, LANES), jnp.int32),
            pltpu.VMEM((2, bk, chunks(bq, MASKED_CHUNK)[0].size), jnp.float32),
            pltpu.SMEM((3, RING), jnp.int32),
            pltpu.SemaphoreType.DMA((RING,)),
            pltpu.SemaphoreType.DMA((RING,)),
        ],
    )
    of_keys = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_GMK, v_GMK))
    return pl.pallas_call(
        functools.partial(_kernel, options=options),
        grid_spec=grid,
        out_shape=[jax.ShapeDtypeStruct((G, R, K, N), jnp.float32), *of_keys],
        compiler_params=PARAMS,
        name="attention_backward",
        interpret=interpret,
    )(
        *(plan.by_key, plan.base, plan.first_key, q_GRNK, k_GMK, v_GMK),
        *(do, lse_GR1N, di_GR1N, *rows_of(plan)),
    )


SUBLANES = 16
"""Of a register of bfloat16."""
EACH_BLOCK = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_LIMIT)


def _sums_kernel(do: Any, out: Any, di: Any, *, head_dim: int) -> None:
    def of(r: jax.Array) -> None:
        part = of_head(do, r, head_dim)[...].astype(jnp.float32) * of_head(out, r, head_dim)[...].astype(jnp.float32)
        # A product with ones puts the sums on lanes; two in bfloat16 take 16 of the terms' 24 bits.
        ones, high = jnp.ones((SUBLANES, head_dim), do.dtype), part.astype(do.dtype)
        total = product(ones, high, 1, 1)
        if high.dtype != part.dtype:
            total += product(ones, (part - high.astype(jnp.float32)).astype(do.dtype), 1, 1)
        di[0, r] = total[:1]

    each_head(di.shape[1], of)


def output_sums(do_NX: jax.Array, out_NX: jax.Array, G: int, R: int, width: int, interpret: Any = False) -> jax.Array:
    """The sums `[G, R, 1, N] float32` over each head of do x out, both `[N, G * R * K]`; `width` divides N."""
    N, K = do_NX.shape[0], do_NX.shape[1] // (G * R)
    flat = pl.BlockSpec((width, R * K), lambda g, i: (i, g))
    return pl.pallas_call(
        functools.partial(_sums_kernel, head_dim=K),
        grid=(G, N // width),
        in_specs=[flat, flat],
        out_specs=pl.BlockSpec((1, R, 1, width), lambda g, i: (g, 0, 0, i)),
        out_shape=jax.ShapeDtypeStruct((G, R, 1, N), jnp.float32),
        compiler_params=EACH_BLOCK,
        name="attention_sums",
        interpret=interpret,
    )(do_NX, out_NX)


def _turn_kernel(first_key: Any, dq: Any, out: Any, *, factor: float) -> None:
    def of(r: jax.Array) -> None:
        out[0, r] = jnp.transpose((dq[0, r] * factor).astype(out.dtype))

    seen = first_key[pl.program_id(1)] != NOWHERE
    pl.when(seen)(lambda: each_head(dq.shape[1], of))

    @pl.when(jnp.logical_not(seen))
    def _():
        out[...] = jnp.zeros_like(out)


def turned_back(dq_GRKN: jax.Array, plan: Plan, factor: float, dtype: Any, interpret: Any = False) -> jax.Array:
    """`dq [G, R, N, K]` in `dtype`, multiplied, and zero where nothing is seen."""
    G, R, K, N = dq_GRKN.shape
    width = plan.blocks.q
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(G, N // width),
        in_specs=[pl.BlockSpec((1, R, K, width), lambda g, i, _: (g, 0, 0, i))],
        out_specs=pl.BlockSpec((1, R, width, K), lambda g, i, _: (g, 0, i, 0)),
    )
    return pl.pallas_call(
        functools.partial(_turn_kernel, factor=factor),
        grid_spec=grid,
        out_shape=jax.ShapeDtypeStruct((G, R, N, K), dtype),
        compiler_params=EACH_BLOCK,
        name="attention_turn",
        interpret=interpret,
    )(plan.first_key, dq_GRKN)
