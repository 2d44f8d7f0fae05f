"""Communication of a compiled program: which devices of the torus take part, how many bytes cross a link, how long.

A group of devices spans some dimensions of the torus. A ring uses both directions of each dimension that it spans, or
one where the dimension's ends are not joined, so that a gather of `bytes` in all takes bytes x (n - 1) / n / (links x
link speed); a reduction over the group costs as much, and an all-reduce both. Latency is left out.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, Literal

from mmgpt.plan.chips import Chip
from mmgpt.plan.hlo import Instruction, Program, Source, size_of_result

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all", "ragged-all-to-all")
WRAPPED = 4
"""Devices along a dimension of a v4, v5p or v7x from which on its ends are joined; of a v5e or v6e it is 16."""
WRAPPED_FLAT = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One kind of communication: `group` devices, `links` that carry it at once, `bytes` that one device has in the
    end (of a gather) or gives (of a reduction), and `seconds`. `source` is the line that asked for it, `channel` what
    carries it."""

    kind: str
    name: str
    group: int
    links: int
    bytes: int
    seconds: float
    op_name: str
    source: Source | None
    channel: Literal["links", "network", "host"] = "links"


def found_in(program: Program, instruction: Instruction) -> list[Instruction]:
    """The communication inside an instruction: itself, or what an asynchronous one or a fusion calls."""
    kind = instruction.opcode.removesuffix("-start")
    if kind in KINDS:
        return [instruction]
    found = []
    for called in instruction.calls.values():
        for inner in program.computations.get(called, {}).values():
            found += found_in(program, inner)
    return found


class Torus:
    """The devices of a mesh in the order of the compiled program's numbers, and the links between them."""

    def __init__(self, chip: Chip, devices: Sequence[Any]):
        self.chip = chip
        self.places = [(*tuple(d.coords), getattr(d, "slice_index", 0) or 0) for d in devices]
        self.sides = [len({place[i] for place in self.places}) for i in range(len(self.places[0]))]

    def collective(self, program: Program, instruction: Instruction) -> Collective:
        """What an instruction of one of `KINDS` costs."""
        kind = instruction.opcode.removesuffix("-start")
        groups = groups_of(instruction.line, len(self.places))
        group = groups[0] if groups else list(range(len(self.places)))
        n, links = len(group), self.links(group)
        held = {o: program_operand(program, instruction, o) for o in instruction.operands}
        given, made = sum(held.values()), size_of_result(instruction)
        whole = max(given, made)
        slices = len({self.places[i][-1] for i in group})
        within = n // slices
        seconds = _passes(kind, within) * whole / (self.chip.link * links)
        if slices > 1:
            seconds += _passes(kind, slices) * whole / within / self.chip.network
        return Collective(
            kind=kind,
            name=instruction.name,
            group=max(n, 1),
            links=links,
            bytes=whole,
            seconds=seconds,
            op_name=instruction.op_name,
            source=program.source(instruction),
        )

    def links(self, group: Sequence[int]) -> int:
        """Links that carry a ring over these devices at once."""
        places = [self.places[i] for i in group]
        joined = WRAPPED if self.chip.dimensions == 3 else WRAPPED_FLAT
        total = 0
        for dim in range(self.chip.dimensions):
            along = len({place[dim] for place in places})
            if along > 1:
                total += 2 if along == self.sides[dim] and along >= joined else 1
        return max(total, 1)


def _passes(kind: str, n: int) -> float:
    """How often a ring of `n` carries the whole array past each of its links."""
    if n < 2 and kind != "collective-permute":
        return 0.0
    share = (n - 1) / n
    passes = {"all-reduce": 2.0 * share, "all-gather": share, "reduce-scatter": share, "all-to-all": share / 2}
    return passes.get(kind, 1.0)


def program_operand(program: Program, instruction: Instruction, name: str) -> int:
    """Bytes of an operand, wherever it is made."""
    for computation in program.computations.values():
        if instruction.name in computation and name in computation:
            return size_of_result(computation[name])
    return 0


def groups_of(line: str, count: int) -> list[list[int]]:
    """The groups of devices of a collective, in any of the ways that the text has for them; none where it has none."""
    if listed := re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", line):
        return [[int(n) for n in re.findall(r"\d+", part)] for part in re.findall(r"\{([\d,\s]*)\}", listed[1])]
    ordered = r"(?:,\s*device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
    if meshed := re.search(rf"replica_groups=mesh\[([^\]]*)\]{ordered}\s*\{{([^}}]*)\}}", line):
        axes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", meshed[1])}
        over = re.findall(r"'([^']+)'", meshed[4])
        groups = _along(list(axes.values()), [i for i, name in enumerate(axes) if name in over])
        if not meshed[2]:
            return groups
        dims = [int(n) for n in meshed[2].split(",")]
        numbers = _transposed(dims, [int(n) for n in (meshed[3] or ",".join(map(str, range(len(dims))))).split(",")])
        return [[numbers[i] for i in group] for group in groups]
    if counted := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, dims = ([int(n) for n in counted[i].split(",")] for i in (1, 2))
        order = [int(n) for n in counted[3].split(",")] if counted[3] else list(range(len(dims)))
        flat = _transposed(dims, order)
        each = shape[-1]
        return [flat[i : i + each] for i in range(0, math.prod(shape), each)]
    return []


def _along(sides: list[int], over: list[int]) -> list[list[int]]:
    """Groups of a mesh's devices, numbered in row-major order, that differ along some of its axes."""
    rest = [i for i in range(len(sides)) if i not in over]
    flat = _transposed(sides, [*rest, *over])
    each = math.prod(sides[i] for i in over)
    return [flat[i : i + each] for i in range(0, len(flat), each)]


def _transposed(sides: list[int], order: list[int]) -> list[int]:
    """0, 1, 2, ... laid out with these sides, read with its axes in another order."""
    import numpy as np

    return np.arange(math.prod(sides)).reshape(sides).transpose(order).ravel().tolist()
