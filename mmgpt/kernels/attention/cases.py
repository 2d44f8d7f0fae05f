"""Attention problems that every implementation must solve: visibility families, shapes, options, and the tolerances."""

import dataclasses

import numpy as np

from mmgpt.core.stream import Visibility, packed_causal
from mmgpt.kernels.attention.plan import Blocks

TOLERANCES = {"float32": (2e-6, 2e-5), "bfloat16": (1e-2, 4e-2)}
"""Largest absolute error against float64 of (outputs, gradients), by dtype of the inputs, for values of order 1."""

SMALL = Blocks(8, 4)
"""Cuts 16 positions into blocks of every class."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A problem: `rows` B, `queries` T, `keys` S, `heads` H over `kv_heads` G, `head_dim` K, and what goes with it.

    `blocks` are those of an implementation that works by a plan.
    """

    name: str
    visibility: Visibility
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    scale: float | None = None
    soft_cap: float | None = None
    sinks: bool = False
    dtype: str = "float32"
    blocks: Blocks = SMALL

    def arrays(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        """`q [B, T, H, K]`, `k, v [B, S, G, K]`, `sinks [H]` or None: float32 of order 1."""
        rng = np.random.default_rng(seed)
        B, T = self.visibility.start.shape
        S = self.visibility.index.shape[1]
        q = rng.standard_normal((B, T, self.heads, self.head_dim)).astype(np.float32)
        k, v = rng.standard_normal((2, B, S, self.kv_heads, self.head_dim)).astype(np.float32)
        return q, k, v, rng.standard_normal(self.heads).astype(np.float32) if self.sinks else None


def _rows(*rows: list[int]) -> np.ndarray:
    return np.array(rows, np.int32)


def causal(rows: int, length: int) -> Visibility:
    """Each query sees the keys up to itself."""
    return packed_causal(np.zeros((rows, length), np.int32))


def packed() -> Visibility:
    """Three documents and padding; one document and much padding; no padding."""
    return packed_causal(_rows([0] * 5 + [1] * 4 + [2] * 2 + [-1] * 5, [0] * 3 + [-1] * 13, [0] * 8 + [1] * 8))


def bidirectional_span() -> Visibility:
    """Causal, but the positions 4 to 9 of a picture see one another."""
    seen = causal(2, 16)
    stop = np.array(seen.stop)
    stop[:, 4:10] = 10
    return dataclasses.replace(seen, stop=stop)


def prefix() -> Visibility:
    """The first 6 positions see one another, the others are causal."""
    seen = causal(2, 16)
    return dataclasses.replace(seen, stop=np.maximum(seen.stop, 6))


def sliding_window(width: int = 3) -> Visibility:
    """Each query sees itself and the `width - 1` keys before it."""
    seen = causal(2, 16)
    return dataclasses.replace(seen, start=np.maximum(seen.stop - width, 0))


def full() -> Visibility:
    """Every query sees every key of its document."""
    seen = packed_causal(_rows([0] * 9 + [1] * 7, [0] * 16))
    return dataclasses.replace(seen, stop=_rows([9] * 9 + [16] * 7, [16] * 16))


def islands() -> Visibility:
    """Text, a noisy copy of a picture (island 1), its clean copy, more text: the rest never sees the noisy copy."""
    seen = causal(2, 16)
    island = _rows([0] * 4 + [1] * 4 + [0] * 8, [0] * 2 + [1] * 3 + [2] * 3 + [0] * 8)
    return dataclasses.replace(seen, island=island, key_island=island)


def cached() -> Visibility:
    """Two new queries over a cache of 16 slots, of which the first ones (left padding) and the last ones are empty."""
    index = np.broadcast_to(np.arange(16, dtype=np.int32), (2, 16))
    return Visibility(
        start=np.zeros((2, 2), np.int32),
        stop=_rows([11, 12], [11, 12]),
        island=np.zeros((2, 2), np.int32),
        index=index,
        key_island=np.where(index < np.array([[3], [0]]), -1, 0).astype(np.int32),
    )


def nothing() -> Visibility:
    """Some queries see nothing: an empty interval, one outside all keys, and a row that is all padding."""
    seen = causal(2, 8)
    start, stop, island = np.array(seen.start), np.array(seen.stop), np.array(seen.key_island)
    start[0, 2], stop[0, 2] = 5, 5
    start[0, 4], stop[0, 4] = 8, 20
    start[0, 6], stop[0, 6] = 7, 3
    island[1] = -1
    return dataclasses.replace(seen, start=start, stop=stop, key_island=island)


def documents(rows: int = 1) -> Visibility:
    """Five documents in 300 positions, the last 6 of which are padding: no length is a multiple of a block."""
    return packed_causal(_rows(*[[0] * 130 + [1] * 20 + [2] * 64 + [3] * 50 + [4] * 30 + [-1] * 6] * rows))


def noisy_copies() -> Visibility:
    """Two documents, each with a noisy copy (islands 1 and 2) of 70 positions before its clean copy, all pictures."""
    seen = packed_causal(_rows([0] * 160 + [1] * 140))
    island, stop = np.zeros((1, 300), np.int32), np.array(seen.stop)
    for number, first in ((1, 10), (2, 160)):
        island[:, first : first + 70] = number
        stop[:, first : first + 70] = first + 70
    return dataclasses.replace(seen, island=island, key_island=island, stop=stop)


def far_out() -> Visibility:
    """Intervals as far as int32 goes, keys before 0, and queries and keys of negative islands."""
    seen = causal(2, 40)
    start, stop = np.array(seen.start), np.array(seen.stop)
    start[0], stop[1] = -(2**31), 2**31 - 1
    island, key_island = np.zeros_like(start), np.zeros_like(start)
    island[0, 30:], key_island[0, 35:] = -1, -1
    key_island[1, :5], island[1, :3] = -1, -1
    index = seen.index - np.array([[0], [5]], np.int32)
    return Visibility(start=start, stop=stop, island=island, index=index.astype(np.int32), key_island=key_island)


def prompt() -> Visibility:
    """The last 40 of 100 positions over all of them: a prompt in pieces."""
    seen = causal(2, 100)
    return dataclasses.replace(seen, start=seen.start[:, 60:], stop=seen.stop[:, 60:], island=seen.island[:, 60:])


CASES: tuple[Case, ...] = (
    Case(name="causal", visibility=causal(2, 16)),
    Case(name="one_token", visibility=causal(1, 1)),
    Case(name="packed", visibility=packed()),
    Case(name="bidirectional_span", visibility=bidirectional_span()),
    Case(name="prefix", visibility=prefix()),
    Case(name="sliding_window", visibility=sliding_window()),
    Case(name="full", visibility=full()),
    Case(name="islands", visibility=islands()),
    Case(name="cached", visibility=cached()),
    Case(name="nothing", visibility=nothing()),
    Case(name="nothing_with_sinks", visibility=nothing(), sinks=True),
    Case(name="one_kv_head", visibility=packed(), heads=4, kv_heads=1),
    Case(name="no_groups", visibility=packed(), heads=3, kv_heads=3, head_dim=64),
    Case(name="head_dim_128", visibility=packed(), heads=2, kv_heads=1, head_dim=128),
    Case(name="soft_cap", visibility=packed(), soft_cap=1.5),
    Case(name="sinks", visibility=packed(), sinks=True),
    Case(name="scale", visibility=packed(), scale=1.0, soft_cap=5.0, sinks=True),
    Case(name="long", visibility=causal(1, 96), heads=2, kv_heads=2),
    Case(name="bfloat16", visibility=packed(), dtype="bfloat16"),
    Case(name="head_dim_80", visibility=packed(), heads=6, kv_heads=2, head_dim=80),
    Case(name="head_dim_96", visibility=packed(), heads=8, kv_heads=1, head_dim=96),
    Case(name="head_dim_256", visibility=packed(), heads=4, kv_heads=4, head_dim=256),
    Case(name="documents", visibility=documents(2), head_dim=64, blocks=Blocks(32, 16)),
    Case(name="documents_sinks", visibility=documents(), soft_cap=2.0, sinks=True, blocks=Blocks(16, 32)),
    Case(name="documents_bfloat16", visibility=documents(), head_dim=128, dtype="bfloat16", blocks=Blocks(32, 32)),
    Case(name="wide_blocks", visibility=documents(), heads=6, kv_heads=2, blocks=Blocks(128, 64)),
    Case(name="noisy_copies", visibility=noisy_copies(), head_dim=64, blocks=Blocks(16, 16)),
    Case(name="far_out", visibility=far_out(), blocks=Blocks(8, 16)),
    Case(name="prompt", visibility=prompt(), blocks=Blocks(16, 32)),
)
"""Every case is one problem of one family; a new implementation must solve all of them."""
