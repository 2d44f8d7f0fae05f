"""Seconds of the attention kernels in a step: the blocks that a mix of documents makes them visit, by their schedules.

The cycles of a block are those of `mmgpt bench attention` (libtpu 0.0.52), kept here because reading a schedule takes
minutes; a block of another size is taken to cost in proportion to its area.
"""

import dataclasses
import functools

import numpy as np

from mmgpt.core.config import ConfigError
from mmgpt.kernels.attention import pallas_tpu
from mmgpt.kernels.attention.plan import Blocks
from mmgpt.models.decoder import Decoder
from mmgpt.plan.attention import Cycles, Visits, documents, planned, projected, visible_pairs, visits
from mmgpt.plan.chips import Chip
from mmgpt.plan.kernel_cycles import TARGETS

KINDS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "v7x": "TPU7x"}

_Numbers = tuple[float, float, float, float, float]
SCHEDULES: dict[tuple[str, int, int, str], _Numbers] = {
    ("v5p", 128, 512, "bounded"): (4335, 4505, 4519, 276, 1046),
    ("v5p", 128, 512, "online"): (4502, 4734, 5523, 260, 1046),
    ("v5p", 128, 512, "backward"): (10359, 10485, 10785, 586, 1171),
    ("v5p", 128, 1024, "bounded"): (16615, 17068, 17615, 270, 1975),
    ("v5p", 128, 1024, "online"): (17851, 18368, 19184, 270, 1979),
    ("v5p", 128, 1024, "backward"): (41210, 41406, 41710, 464, 1841),
    ("v5e", 128, 512, "bounded"): (4341, 4484, 4526, 213, 1029),
    ("v5e", 128, 512, "backward"): (10324, 10471, 10772, 373, 1124),
    ("v5e", 128, 1024, "bounded"): (16596, 16668, 17624, 212, 1912),
    ("v5e", 128, 1024, "backward"): (41157, 41384, 41688, 403, 2059),
    ("v6e", 256, 1024, "bounded"): (4351, 4902, 6607, 224, 1189),
    ("v6e", 256, 1024, "backward"): (10496, 10991, 13092, 439, 1546),
    ("v7x", 256, 1024, "bounded"): (4256, 4442, 5965, 338, 1164),
    ("v7x", 256, 1024, "backward"): (10477, 10675, 12645, 503, 1514),
    ("v6e", 128, 1024, "bounded"): (6610, 8518, 11776, 267, 1365),
    ("v6e", 128, 1024, "online"): (8288, 10648, 14046, 260, 1365),
    ("v6e", 128, 1024, "backward"): (18908, 20024, 21610, 416, 1205),
    ("v7x", 128, 1024, "bounded"): (6306, 8014, 10419, 359, 1322),
    ("v7x", 128, 1024, "online"): (7714, 10452, 13317, 348, 1322),
    ("v7x", 128, 1024, "backward"): (19217, 21147, 22431, 511, 1192),
}
"""(cores, head dim, side of a block, pass): cycles of a full, an edge and a mixed block of `HEADS`, of a step, of a row
of blocks. "bounded" and "online" are the forward pass without and with a running maximum."""
HEADS = {128: 4, 256: 2}
"""By head dim: the query heads of one key head in those schedules, which a kernel goes through in each step. As many
others take in proportion."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """Seconds of one layer's kernels on one chip, and the pairs of a query and a key that all rows of a step see."""

    forward: float
    backward: float
    pairs: int
    visited: int
    """Blocks that a row visits."""
    causal: int
    """Those that a row of one document would."""


def attention(
    model: Decoder.Config, chip: Chip, *, length: int, rows: int, kind: str, shards: dict[str, int]
) -> Attention:
    """The time for `rows` rows on a chip of documents of a `kind` (`attention.documents`); `shards`: the mesh.

    `pairs` are those of one row. ConfigError where a schedule is not known.
    """
    heads, kv_heads = model.heads // shards["tensor"], max(1, model.kv_heads // shards["tensor"])
    context = shards["context"]
    blocks = pallas_tpu.blocks(length // context, length, heads // kv_heads, model.head_dim, rows, KINDS[chip.target])
    document = documents(length, kind)
    seen = _visits(length, kind, blocks)
    forward = "bounded" if model.qk_norm != "none" else "online"
    cores = TARGETS[chip.target].cores
    seconds = []
    for phase, name in (("forward", forward), ("backward", "backward")):
        cycles = _cycles(chip.target, model.head_dim, blocks, name, heads // kv_heads)
        of_rows = projected(seen[phase], cycles, heads=heads, sequences=rows, cores=cores, units=kv_heads)
        seconds.append(of_rows / context / chip.clock)
    n = -(-length // blocks.q)
    return Attention(
        forward=seconds[0],
        backward=seconds[1],
        pairs=visible_pairs(document),
        visited=seen["forward"].blocks,
        causal=sum(-(-min(length, (i + 1) * blocks.q) // blocks.k) for i in range(n)),
    )


@functools.lru_cache(maxsize=32)
def _visits(length: int, kind: str, blocks: Blocks) -> dict[str, Visits]:
    import jax

    with jax.default_device(jax.devices("cpu")[0]):
        return visits(planned(np.asarray(documents(length, kind)), blocks))


def _cycles(target: str, head_dim: int, blocks: Blocks, name: str, group: int) -> Cycles:
    known = [key for key in SCHEDULES if key[0] == target and key[1] == head_dim and key[3] == name]
    if not known:
        raise ConfigError(
            f"no schedule of attention is known for {target}, head dim {head_dim}, {name}; `mmgpt bench attention "
            f"--target {target} --head-dim {head_dim}` reads one, for plan/attention_time.py."
        )
    key = min(known, key=lambda k: abs(k[2] * k[2] - blocks.q * blocks.k))
    full, edge, mixed, step, row = SCHEDULES[key]
    more = group / HEADS[head_dim]
    area = more * blocks.q * blocks.k / key[2] ** 2
    return Cycles(full=full * area, edge=edge * area, mixed=mixed * area, step=step, row=row * more, heads=group)
