"""The block plan against the rule written out: the blocks it lists are those in which something is seen."""

import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from mmgpt.core.stream import Visibility, packed_causal
from mmgpt.kernels.attention import plan
from mmgpt.kernels.attention.cases import causal
from mmgpt.kernels.attention.plan import EDGE, EMPTY, FULL, MIXED, Blocks, Plan
from mmgpt.kernels.attention.reference import visible

LENGTH = 64
SIZES = (Blocks(8, 8), Blocks(16, 8), Blocks(8, 16), Blocks(4, 32))
make = jax.jit(plan.make, static_argnums=1)


@dataclasses.dataclass
class Row:
    """One row of a visibility under way, each `[LENGTH]`."""

    start: np.ndarray
    stop: np.ndarray
    island: np.ndarray
    key_island: np.ndarray


def document(row: Row, first: int, length: int, draw: st.DrawFn, islands: int) -> int:
    """Lays out a document of a drawn kind from `first` on; returns how many islands the row has then."""
    end = first + length
    at = np.arange(first, end)
    inside = st.integers(1, length)
    row.start[at], row.stop[at] = first, at + 1
    kind = draw(st.sampled_from(("causal", "full", "prefix", "window", "span", "islands", "padding")))
    if kind == "full":
        row.stop[at] = end
    elif kind == "prefix":
        row.stop[at] = np.maximum(at + 1, first + draw(inside))
    elif kind == "window":
        row.start[at] = np.maximum(first, at + 1 - draw(inside))
    elif kind == "padding":
        row.stop[at], row.key_island[at] = first, -1
    elif kind == "span":
        low = first + draw(inside) - 1
        high = min(end, low + draw(inside))
        row.stop[low:high] = high
    elif kind == "islands":
        for _ in range(draw(st.integers(1, 3))):
            low = first + draw(inside) - 1
            high = min(end, low + draw(inside))
            if not row.island[low:high].any():  # an island is one run
                islands += 1
                row.island[low:high] = row.key_island[low:high] = islands
                if draw(st.booleans()):
                    row.stop[low:high] = high
    return islands


@st.composite
def visibilities(draw: st.DrawFn) -> Visibility:
    """Two rows of documents, some under a window of the whole row, some with single keys missing."""
    rows = []
    for _ in range(2):
        row = Row(*(np.zeros(LENGTH, np.int32) for _ in range(4)))
        first = islands = 0
        while first < LENGTH:
            length = min(draw(st.integers(1, LENGTH // 2 + 1)), LENGTH - first)
            islands = document(row, first, length, draw, islands)
            first += length
        if draw(st.integers(0, 3)) == 0:
            row.start = np.maximum(row.start, row.stop - draw(st.integers(1, 20)))
        row.key_island[draw(st.lists(st.integers(0, LENGTH - 1), max_size=4))] = -1
        rows.append(row)
    parts = {f.name: np.stack([getattr(row, f.name) for row in rows]).astype(np.int32) for f in dataclasses.fields(Row)}
    index = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (2, LENGTH))
    return Visibility(index=np.ascontiguousarray(index), **parts)


def moved(seen: Visibility, k_block: int, order: list[int]) -> Visibility:
    """The same keys with their blocks in another order, as zigzag sharding lays them out."""

    def turned(x: np.ndarray) -> np.ndarray:
        return x.reshape(x.shape[0], -1, k_block)[:, order].reshape(x.shape)

    return dataclasses.replace(seen, index=turned(seen.index), key_island=turned(seen.key_island))


def by_rule(seen: Visibility, blocks: Blocks) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every block `[B, T / q, S / k]`: anything is seen, all is seen, no key's island is asked for.

    That is so where every island sees the keys, but for some at the end that lie where all intervals have ended.
    """
    mask = np.asarray(visible(seen))
    B, T, S = mask.shape
    cut = mask.reshape(B, T // blocks.q, blocks.q, S // blocks.k, blocks.k)
    asked = (seen.start[:, :, None] <= seen.index[:, None, :]) & (seen.index[:, None, :] < seen.stop[:, :, None])
    asked = asked.reshape(cut.shape)
    alone = np.zeros(cut.any(axis=(2, 4)).shape, bool)
    for b, i, j in np.ndindex(alone.shape):
        common = seen.key_island[b, j * blocks.k : (j + 1) * blocks.k] == 0
        first = int(common.sum())  # the place of the first other key, if they are all at the end
        stops = seen.stop[b, i * blocks.q : (i + 1) * blocks.q]
        reach = max(stops[stops > seen.start[b, i * blocks.q : (i + 1) * blocks.q]], default=0)
        behind = seen.index[b, j * blocks.k] + first >= reach
        alone[b, i, j] = common[:first].all() and (first == blocks.k or behind)
        assert not alone[b, i, j] or np.array_equal(asked[b, i, :, j], cut[b, i, :, j])
    return cut.any(axis=(2, 4)), cut.all(axis=(2, 4)), alone


def listed(made: Plan, rows: int, *, by_key: bool) -> np.ndarray:
    """The class of every block, -1 where there is no entry, from one of the two lists: `[B, T / q, S / k]`."""
    entries, count = (made.by_key, made.count_by_key) if by_key else (made.by_query, made.count_by_query)
    entries = np.asarray(entries)[: int(count[0])]
    assert (np.diff(entries) > 0).all()
    i, j, klass = (np.asarray(x) for x in plan.unpacked(entries))
    if by_key:
        i, j = j, i
    across, along = made.start.size // made.blocks.q // rows, made.key_island.size // made.blocks.k // rows
    assert (i // across == j // along).all()  # no block joins two rows
    classes = np.full((rows, across, along), -1)
    classes[i // across, i % across, j % along] = klass
    return classes


def check(seen: Visibility, blocks: Blocks) -> None:
    made = make(seen, blocks)
    some, every, alone = by_rule(seen, blocks)
    for by_key, axis in ((False, 2), (True, 1)):
        classes = listed(made, seen.start.shape[0], by_key=by_key)
        assert np.array_equal(classes > EMPTY, some)
        assert np.array_equal(classes == FULL, every)
        assert np.array_equal(classes == EDGE, some & ~every & alone)
        assert np.array_equal(classes == MIXED, some & ~every & ~alone)
        # A block of queries (of keys) without another entry has one that is empty, and no other block has any.
        assert np.array_equal((classes == EMPTY).sum(axis=axis), ~some.any(axis=axis))
        check_rows(made, (classes >= 0).sum(axis=axis).reshape(-1), by_key=by_key)
    first = some.argmax(axis=2) + np.arange(len(some))[:, None] * some.shape[2]
    first = np.where(some.any(axis=2), first, plan.NOWHERE)
    assert np.array_equal(made.first_key, first.reshape(-1))
    mask = np.asarray(visible(seen))
    square = mask.shape[1] == mask.shape[2] and np.array_equal(mask, np.tril(np.ones_like(mask)))
    assert not made.causal[0] or square  # other numbers may say causal too, and are told no


def check_rows(made: Plan, lengths: np.ndarray, *, by_key: bool) -> None:
    """Where each block's entries begin, and the blocks with most entries first, those with as many in order."""
    rows, order = (made.rows_by_key, made.order_by_key) if by_key else (made.rows_by_query, made.order_by_query)
    assert np.array_equal(rows, np.r_[0, np.cumsum(lengths)])
    assert np.array_equal(order, np.argsort(-lengths, kind="stable"))


@hypothesis.settings(max_examples=150)
@hypothesis.given(visibilities(), st.sampled_from(SIZES))
def test_a_plan_lists_the_blocks_in_which_something_is_seen(seen: Visibility, blocks: Blocks) -> None:
    check(seen, blocks)


@hypothesis.settings(max_examples=50)
@hypothesis.given(visibilities(), st.permutations(range(8)))
def test_keys_may_lie_in_any_order_of_blocks(seen: Visibility, order: list[int]) -> None:
    check(moved(seen, 8, order), Blocks(8, 8))


@pytest.mark.parametrize("blocks", SIZES)
def test_causal_rows_are_known_and_nothing_else_is(blocks: Blocks) -> None:
    seen = causal(2, 24)
    assert make(seen, blocks).causal[0]
    assert make(dataclasses.replace(seen, start=seen.start - 5), blocks).causal[0]
    others = {
        "start": np.array(seen.start),
        "stop": np.array(seen.stop),
        "index": np.array(seen.index),
        "key_island": np.array(seen.key_island),
    }
    for name, x in others.items():
        x[1, 20] = 21 if name != "stop" else 24
        assert not make(dataclasses.replace(seen, **{name: x}), blocks).causal[0], name
    part = {name: getattr(seen, name)[:, 8:] for name in ("start", "stop", "island")}
    assert not make(dataclasses.replace(seen, **part), blocks).causal[0]


def test_many_small_blocks_are_planned_several_at_once() -> None:
    length = 16 * (2 * plan.MOST_TURNS + 45)
    document = np.minimum(np.arange(length, dtype=np.int32)[None] // 700, 6)
    check(packed_causal(np.where(np.arange(length) < length - 100, document, -1)), Blocks(length // 43, 16))


def test_rows_are_filled_up_to_whole_blocks_that_nobody_sees() -> None:
    made = make(causal(2, 13), Blocks(4, 8))
    assert made.start.shape == (2 * 16,) and made.key_island.shape == (2 * 16,) and made.base.shape == (2 * 2,)
    assert np.asarray(made.key_island).reshape(2, 16)[:, 13:].tolist() == [[-1] * 3] * 2
    assert listed(made, 2, by_key=False).tolist() == [[[EDGE, -1], [EDGE, -1], [FULL, EDGE], [EDGE, EDGE]]] * 2


def test_too_many_blocks_are_told() -> None:
    seen = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, causal(3, 8)))
    long = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, 8 * plan.MOST_BLOCKS // 2), x.dtype), seen)
    with pytest.raises(ValueError, match=r"more than 16384 blocks of .* use larger blocks or fewer rows on a device"):
        jax.eval_shape(lambda seen: plan.make(seen, Blocks(8, 8)), long)
    jax.eval_shape(lambda seen: plan.make(seen, Blocks(16, 16)), long)
