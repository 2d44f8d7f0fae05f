"""Which positions of a row lie on which device of the context axis, so that each visits equally many blocks.

Attention works by the visibility's `index`, not by place, and every other array of a stream carries what belongs to
its position: a row's positions may stand in any order. They move in whole units, within which indices stay
consecutive, as a plan's blocks of keys need them. The order is a pure function of the row's visibility, made in numpy
where a batch is placed on its mesh.

Shapes: T positions of one row in n units, C devices along the context axis.
"""

import dataclasses

import numpy as np

from mmgpt.core.stream import Batch, Stream, Visibility
from mmgpt.kernels.attention.plan import MOST_ENTRIES, MOST_SIDE, side

WORK = 2**22
"""What a descent may cost: trials of a unit x other units x devices^2. 8 devices with 128 units get 512 trials, some 50
ms; 64 devices two, and then keep what dealing gives."""
EVEN = 1.03
"""A slowest device with so many times the mean's visits is as good as one with less: then the ring's steps decide."""
OF_TOTALS = 4.0
"""The weight of a device's visits in all against those in one step of a ring."""


def unit(length: int, shards: int) -> int | None:
    """How many positions move as one in rows of `length` on `shards` devices; None where rows stay as they are.

    A multiple of the sides of the kernels' blocks over one device's part of a row, larger where blocks of it would be
    too many for one list. Rows stay where there is one device, or fewer than two whole units for each.
    """
    if shards == 1 or length % shards:
        return None
    part = length // shards
    found = side(part, MOST_SIDE)
    while -(-part // side(part, MOST_SIDE)) * -(-length // found) > MOST_ENTRIES:
        found *= 2
    return found if part % found == 0 and part >= 2 * found else None


def visits(row: Visibility, size: int) -> np.ndarray:
    """`[n, n]` bool: whether some query of one unit of `size` positions sees some key of another.

    `row` is one row, every array `[T]`.
    """
    n = len(row.index) // size
    found = np.zeros((n, n), bool)
    units = np.arange(len(row.index)) // size
    # Keys in the order of island and index; those of one island and one unit are a run.
    number = _numbers(row.key_island, row.index)
    keys = np.argsort(number, kind="stable")
    keys = keys[row.key_island[keys] >= 0]
    if not len(keys):
        return found
    number, key_unit, key_island = number[keys], units[keys], row.key_island[keys]
    begins = np.r_[True, (key_unit[1:] != key_unit[:-1]) | (key_island[1:] != key_island[:-1])]
    run, run_unit = np.cumsum(begins) - 1, key_unit[begins]
    edges = np.zeros((n, len(run_unit) + 1), np.int32)
    own = row.island > 0
    for island, asks in ((np.zeros_like(row.island), row.start < row.stop), (row.island, own & (row.start < row.stop))):
        first = np.searchsorted(number, _numbers(island, row.start)[asks])
        last = np.searchsorted(number, _numbers(island, row.stop)[asks]) - 1
        sees = first <= last
        at = units[: len(asks)][asks][sees]
        np.add.at(edges, (at, run[first[sees]]), 1)
        np.add.at(edges, (at, run[last[sees]] + 1), -1)
    at, seen = np.nonzero(np.cumsum(edges, axis=1)[:, :-1] > 0)
    found[at, run_unit[seen]] = True
    return found


def _numbers(island: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Ascending in islands and then indices."""
    return (island.astype(np.int64) << 32) + index


def shares(visited: np.ndarray, shards: int) -> np.ndarray:
    """The device of each unit `[n]`: as many units for each, and as nearly as possible as many visits.

    Of orders that do so, one in which each step of a ring of devices, in which keys pass from one to the next, also
    takes all of them nearly as long. The order as it is stays where none is better.
    """
    dealt = _dealt(visited.sum(axis=1), shards)
    candidates = [np.arange(len(visited)) // (len(visited) // shards), dealt, _descended(visited, dealt, shards)]

    def cost(share: np.ndarray) -> tuple[float, float]:
        total, stepwise = slowest(visited, share, shards)
        return max(total, EVEN), stepwise

    return min(candidates, key=cost)


def slowest(visited: np.ndarray, share: np.ndarray, shards: int) -> tuple[float, float]:
    """The slowest device's visits by the mean's: in all, and with a wait for the slowest after each step of a ring."""
    devices = np.eye(shards)[share]
    table = devices.T @ visited @ devices
    mean = max(table.sum() / shards, 1.0)
    return float(table.sum(axis=1).max() / mean), float(_by_step(table).max(axis=-1).sum() / mean)


def _by_step(table: np.ndarray) -> np.ndarray:
    """Visits `[..., queries of a device, keys of a device]` by `[..., step of the ring, device]`."""
    device = np.arange(table.shape[-1])
    return table[..., device[None, :], (device[None, :] - device[:, None]) % len(device)]


def _dealt(visits: np.ndarray, shards: int) -> np.ndarray:
    """Each unit, the heaviest first, to the device with the fewest visits that has room."""
    share, load, room = np.zeros(len(visits), np.int64), np.zeros(shards), np.full(shards, len(visits) // shards)
    for i in np.argsort(-visits, kind="stable"):
        device = min((d for d in range(shards) if room[d]), key=lambda d: (load[d], -room[d]))
        share[i] = device
        load[device] += visits[i]
        room[device] -= 1
    return share


def _uneven(table: np.ndarray) -> np.ndarray:
    """Squares of what devices differ by from the mean, in each step of a ring and in all."""
    steps, totals = _by_step(table), table.sum(axis=-1)
    steps, totals = (x - x.mean(axis=-1, keepdims=True) for x in (steps, totals))
    return np.square(steps).sum(axis=(-1, -2)) + OF_TOTALS * np.square(totals).sum(axis=-1)


def _descended(visited: np.ndarray, share: np.ndarray, shards: int) -> np.ndarray:
    """Swaps one unit after another with the unit of another device that evens visits out most, until none does."""
    seen, share, n = visited.astype(np.float64), share.copy(), len(share)
    one_of = np.eye(shards)
    # Visits of each unit's queries by device of the keys, of each unit's keys by device of the queries, of devices.
    of_queries, of_keys = seen @ one_of[share], seen.T @ one_of[share]
    table = one_of[share].T @ of_queries
    now, tried, own = _uneven(table), 0, np.diag(seen)
    order = np.random.default_rng(0).permutation(n)
    for turn in range(WORK // (n * shards**2)):
        i = order[turn % n]
        others = np.nonzero(share != share[i])[0]
        moved = one_of[share[others]] - one_of[share[i]]
        both = own[i] + own[others] - seen[i, others] - seen[others, i]
        rows, columns = of_queries[i] - of_queries[others] + both[:, None] * moved, of_keys[i] - of_keys[others]
        change = moved[:, :, None] * rows[:, None, :] + columns[:, :, None] * moved[:, None, :]
        uneven = _uneven(table + change)
        best = int(uneven.argmin())
        if uneven[best] < now - 1e-6:
            j, now, tried, table = others[best], uneven[best], 0, table + change[best]
            share[i], share[j] = share[j], share[i]
            of_queries += (seen[:, i] - seen[:, j])[:, None] * moved[best]
            of_keys += (seen[i] - seen[j])[:, None] * moved[best]
        elif (tried := tried + 1) >= n:
            break
    return share


def balanced(batch: Batch, shards: int) -> Batch:
    """The numpy batch with positions in the order that evens out `shards` devices; with 1 the batch itself.

    A stream is put in order by the visibility of its own name. A visibility `"a<-b"` is of a's queries and b's keys;
    any other is of one stream's, of that name or the only one. A stream that another's `source` may point into stays.
    Raises ValueError on a visibility whose stream cannot be told.
    """
    pointing = [name for name, stream in batch.streams.items() if stream.source is not None]
    orders: dict[str, np.ndarray] = {}
    for name, seen in batch.visibility.items():
        if name in batch.streams and not any(other != name for other in pointing):
            size = unit(seen.index.shape[1], shards)
            if size is not None:
                orders[name] = np.stack([_order(_row(seen, b), size, shards) for b in range(len(seen.index))])
    if not orders:
        return batch
    streams = {n: _ordered(s, orders[n]) if n in orders else s for n, s in batch.streams.items()}
    visibility = {}
    for name, seen in batch.visibility.items():
        query, key = _sides(name, batch)
        parts = dict.fromkeys(("start", "stop", "island"), query) | {"index": key, "key_island": key}
        found = {f: _taken(vars(seen)[f], orders[s]) if s in orders else vars(seen)[f] for f, s in parts.items()}
        visibility[name] = Visibility(**found)
    return dataclasses.replace(batch, streams=streams, visibility=visibility)


def _row(seen: Visibility, row: int) -> Visibility:
    return Visibility(**{name: part[row] for name, part in vars(seen).items()})


def _order(row: Visibility, size: int, shards: int) -> np.ndarray:
    """The places `[T]` that positions are taken from: device by device, units ascending in each."""
    units = np.argsort(shares(visits(row, size), shards), kind="stable")
    return (units[:, None] * size + np.arange(size)[None, :]).reshape(-1)


def _taken(array: np.ndarray, order_BT: np.ndarray) -> np.ndarray:
    return np.take_along_axis(array, order_BT.reshape(*order_BT.shape, *(1,) * (array.ndim - 2)), axis=1)


def _ordered(stream: Stream, order_BT: np.ndarray) -> Stream:
    """The stream with every array of its positions in order."""
    arrays = {name: part for name, part in vars(stream).items() if isinstance(part, np.ndarray)}
    return dataclasses.replace(stream, **{name: _taken(part, order_BT) for name, part in arrays.items()})


def _sides(name: str, batch: Batch) -> tuple[str, str]:
    """The streams of a visibility's queries and of its keys."""
    query, _, key = name.partition("<-")
    if key or query in batch.streams:
        return query, key or query
    if len(batch.streams) > 1:
        raise ValueError(
            f"visibility {name!r}: of which of the streams {', '.join(batch.streams)} it is cannot be told; name it as "
            'its stream, or "queries<-keys".'
        )
    only = next(iter(batch.streams))
    return only, only
