"""Cycles of attention over packed documents, projected from the cycles of one block and the blocks that are visited.

A pass costs, for each group of heads that a grid step handles: the blocks of each class times the cycles of the body
of that class, the overhead of every step, and the first values and results of every row of blocks. The groups are
spread over the cores that the kernel can use. Work that XLA does outside the kernels is not counted: neither the peers'
sums of partial dq nor our plan.
"""

import dataclasses
import math

import jax
import numpy as np

from mmgpt.core.config import ConfigError
from mmgpt.core.stream import packed_causal
from mmgpt.kernels.attention import plan

MIXES: dict[str, tuple[int, str]] = {
    "8k: 2 of 4.1k": (8192, "4.1k"),
    "8k: 1-2k": (8192, "1-2k"),
    "32k: 4.1k": (32_768, "4.1k"),
    "32k: 1-2k": (32_768, "1-2k"),
    "131k: 8-24k": (131_072, "8-24k"),
    "131k: 4.1k": (131_072, "4.1k"),
    "131k: 1-2k": (131_072, "1-2k"),
    "131k: lognormal": (131_072, "lognormal"),
    "131k: one document": (131_072, "one"),
}
"""Tokens of a row, and the lengths of its documents: 4.1k is a picture with its caption (4,060 to 4,140 tokens),
lognormal a median of 1.1k with sigma 1.5, at most 65k; the last document is cut off at the end of the row."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cycles:
    """Of one pass: bodies by class, what every step costs, what a row of blocks costs; a step handles `heads` heads."""

    full: float
    edge: float
    mixed: float
    step: float
    row: float
    heads: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Visits:
    """Of one row of a batch and one pass: blocks by class, steps that do nothing, and rows of blocks."""

    full: int = 0
    edge: int = 0
    mixed: int = 0
    skipped: int = 0
    rows: int = 0

    @property
    def blocks(self) -> int:
        return self.full + self.edge + self.mixed


def documents(length: int, kind: str, seed: int = 0) -> np.ndarray:
    """Numbers of the documents of a packed row without padding, `[length]` int32."""
    rng = np.random.default_rng(seed)
    draws = {
        "4.1k": lambda: rng.integers(4060, 4141),
        "1-2k": lambda: rng.integers(1000, 2001),
        "8-24k": lambda: rng.integers(8000, 24_001),
        "lognormal": lambda: np.clip(rng.lognormal(np.log(1100), 1.5), 16, 65_536),
        "one": lambda: length,
    }
    if kind not in draws:
        raise ConfigError(f"documents {kind!r}: one of {', '.join(draws)}.")
    sizes: list[int] = []
    while sum(sizes) < length - (200 if kind == "4.1k" else 0):  # two pictures of 4,096 tokens fill a row of 8,192
        sizes.append(int(draws[kind]()))
    if sum(sizes) < length:
        sizes[-1] += length - sum(sizes)
    return np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)[:length]


def planned(document: np.ndarray, blocks: plan.Blocks) -> plan.Plan:
    """The plan of a row `[T]` of packed documents."""
    return jax.jit(plan.make, static_argnums=1)(packed_causal(document[None]), blocks)


def visits(made: plan.Plan) -> dict[str, Visits]:
    """What our kernel visits, `forward` in the order of queries and `backward` in that of keys."""
    sides = {"forward": (made.by_query, made.count_by_query), "backward": (made.by_key, made.count_by_key)}
    found = {}
    for phase, (entries, count) in sides.items():
        first, _, klass = (np.asarray(part) for part in plan.unpacked(entries[: int(count[0])]))
        number = np.bincount(klass, minlength=4)
        found[phase] = Visits(
            full=int(number[plan.FULL]),
            edge=int(number[plan.EDGE]),
            mixed=int(number[plan.MIXED]),
            skipped=int(number[plan.EMPTY]),
            rows=len(np.unique(first)),
        )
    return found


def causal(length: int, block: int) -> Visits:
    """What splash visits, whatever the documents: the causal blocks; the steps above the diagonal do nothing."""
    n = math.ceil(length / block)
    return Visits(full=n * (n - 1) // 2, edge=n, skipped=n * (n - 1) // 2, rows=n)


def by_segments(made: plan.Plan) -> Visits:
    """What tokamax 0.0.17 visits: causal blocks whose ranges of segment ids overlap, the diagonal ones as partial."""
    entries = made.by_query[: int(made.count_by_query[0])]
    i, j, klass = (np.asarray(part) for part in plan.unpacked(entries))
    diagonal = int(np.sum((i == j) & (klass != plan.EMPTY)))
    return Visits(full=int(np.sum(klass != plan.EMPTY)) - diagonal, edge=diagonal, rows=len(np.unique(i)))


def projected(seen: Visits, cycles: Cycles, *, heads: int, sequences: int, cores: int, units: int) -> float:
    """Cycles of a pass over `sequences` rows alike, by the slowest core; `units`: what can be spread over the cores."""
    bodies = seen.full * cycles.full + seen.edge * cycles.edge + seen.mixed * cycles.mixed
    row = bodies + (seen.blocks + seen.skipped) * cycles.step + seen.rows * cycles.row
    total = sequences * heads / cycles.heads * row
    return total * math.ceil(units / cores) / units


def visible_pairs(document: np.ndarray) -> int:
    """Pairs of a query and a key of its document that is not behind it."""
    sizes = np.bincount(document).astype(np.int64)
    return int(np.sum(sizes * (sizes + 1) // 2))


def useful_flops(document: np.ndarray, *, heads: int, head_dim: int, sequences: int) -> float:
    """Of visible pairs, forward (2 matmuls) and backward (5)."""
    return 2.0 * 7 * visible_pairs(document) * head_dim * heads * sequences
