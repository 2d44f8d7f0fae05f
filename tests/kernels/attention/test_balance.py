"""The order of positions that gives every device of the context axis as many blocks to visit."""

import dataclasses

import hypothesis
import jax
import numpy as np
import pytest

from mmgpt.core.stream import Batch, Stream, Visibility, packed_causal
from mmgpt.kernels.attention import balance, plan
from mmgpt.kernels.attention.plan import Blocks
from mmgpt.kernels.attention.reference import visible
from mmgpt.plan.attention import documents
from tests.kernels.attention.test_plan import visibilities

SHARDS = 8


def row(seen: Visibility, b: int = 0) -> Visibility:
    return Visibility(**{name: np.asarray(part)[b] for name, part in vars(seen).items()})


def batch(seen: Visibility) -> Batch:
    B, T = seen.start.shape
    ids = np.arange(B * T, dtype=np.int32).reshape(B, T)
    stream = Stream(ids=ids, position=np.repeat(ids[..., None], 5, axis=2), weight=ids.astype(np.float32))
    return Batch(streams={"tokens": stream}, visibility={"tokens": seen}, row_id=np.arange(B, dtype=np.int64))


def visited(seen: Visibility, size: int) -> np.ndarray:
    """`[device of the queries, device of the keys]`: blocks that the devices' own plans list, as a ring goes."""
    T = seen.start.shape[1]
    part = T // SHARDS
    made = jax.jit(lambda seen: plan.make(seen, Blocks(size, size)))(seen)
    entries = np.asarray(made.by_query)[: int(made.count_by_query[0])]
    i, j, klass = (np.asarray(x) for x in plan.unpacked(entries))
    counts = np.zeros((SHARDS, SHARDS), int)
    seen_at = klass != plan.EMPTY
    np.add.at(counts, (i[seen_at] * size // part, j[seen_at] * size // part), 1)
    return counts


@pytest.mark.parametrize("kind", ["4.1k", "1-2k", "8-24k", "lognormal", "one"])
@pytest.mark.parametrize("length", [32_768, 131_072])
def test_each_device_visits_as_many_blocks(length: int, kind: str) -> None:
    """The slowest of 8 devices by the mean, as the plan counts; and with a wait after each step of a ring."""
    size = balance.unit(length, SHARDS)
    assert size is not None
    before = packed_causal(documents(length, kind)[None])
    after = balance.balanced(batch(before), SHARDS).visibility["tokens"]
    counts = visited(after, size)
    mean = counts.sum() / SHARDS
    steps = [[counts[d, (d - s) % SHARDS] for d in range(SHARDS)] for s in range(SHARDS)]
    assert counts.sum() == visited(before, size).sum()
    assert counts.sum(axis=1).max() <= 1.05 * mean
    assert sum(max(step) for step in steps) <= 1.2 * mean


def test_many_devices_cost_no_more_trials_than_few() -> None:
    """What a descent does is bounded: 64 devices took a minute a row once."""
    seen = row(packed_causal(documents(131_072, "lognormal")[None]))
    size = balance.unit(131_072, 64)
    assert size is not None
    visits = balance.visits(seen, size)
    assert balance.WORK // (len(visits) * 64**2) < 8
    share = balance.shares(visits, 64)
    assert (np.bincount(share) == len(visits) // 64).all()
    assert balance.slowest(visits, share, 64)[0] <= 1.1


@hypothesis.settings(max_examples=100)
@hypothesis.given(visibilities())
def test_visits_are_those_of_the_rule(seen: Visibility) -> None:
    mask = np.asarray(visible(seen))
    for b in range(len(mask)):
        expected = mask[b].reshape(8, 8, 8, 8).any(axis=(1, 3))
        assert np.array_equal(balance.visits(row(seen, b), 8), expected)


def test_what_belongs_to_a_position_moves_with_it() -> None:
    T = 2048
    seen = packed_causal(np.stack([documents(T, "1-2k"), np.zeros(T, np.int32)]))
    seen = dataclasses.replace(
        seen, key_island=np.where(np.arange(T)[None] > 2000, -1, seen.key_island).astype(np.int32)
    )
    plain = batch(seen)
    moved = balance.balanced(plain, 2)
    order = moved.streams["tokens"].ids - np.arange(2)[:, None] * T
    assert not np.array_equal(order, plain.streams["tokens"].ids - np.arange(2)[:, None] * T)
    assert np.array_equal(np.sort(order, axis=1), np.arange(T)[None].repeat(2, 0))
    for name in ("position", "weight"):
        before, after = getattr(plain.streams["tokens"], name), getattr(moved.streams["tokens"], name)
        for b in range(2):
            assert np.array_equal(after[b], before[b][order[b]])
    for b in range(2):
        mask, other = (np.asarray(visible(x.visibility["tokens"]))[b] for x in (plain, moved))
        assert np.array_equal(other, mask[order[b]][:, order[b]])
    size = balance.unit(T, 2)
    assert size is not None
    units = order.reshape(2, -1, size)
    assert (np.diff(units, axis=2) == 1).all() and (units[:, :, 0] % size == 0).all()


def test_rows_stay_where_there_is_nothing_to_share_out() -> None:
    plain = batch(packed_causal(np.zeros((1, 2048), np.int32)))
    assert balance.balanced(plain, 1) is plain
    assert balance.balanced(plain, 16) is plain  # one block for each device
    assert balance.balanced(plain, 3) is plain
    assert balance.unit(1_048_576, 8) is not None


def test_streams_that_others_point_into_stay_and_queries_follow_their_own() -> None:
    T = 1024
    seen = packed_causal(np.arange(T, dtype=np.int32)[None] // 300)
    made = batch(seen)
    text = dataclasses.replace(made.streams["tokens"], source=np.zeros((1, T), np.int32))
    both = dataclasses.replace(
        made,
        streams={"text": text, "media": made.streams["tokens"]},
        visibility={"text": seen, "media": seen, "text<-media": seen},
    )
    moved = balance.balanced(both, 2)
    assert np.array_equal(moved.streams["media"].ids, both.streams["media"].ids)
    order = moved.streams["text"].ids[0]
    assert not np.array_equal(order, np.arange(T))
    cross = moved.visibility["text<-media"]
    assert np.array_equal(cross.start[0], seen.start[0][order]) and np.array_equal(cross.index, seen.index)
    unnamed = dataclasses.replace(both, visibility={"words": seen, "text": seen})
    with pytest.raises(ValueError, match=r"visibility 'words'.*name it as its stream"):
        balance.balanced(unnamed, 2)
