"""Memory of a compiled step, by kind and over its instructions, from what the compiler dumps beside the program.

`xla_dump_to` writes `*buffer-assignment.txt` (each value's place and size in the one block of temporary memory) and
`*live-range.txt` (the instructions in order, and from which to which a value lives). Values that share a place are one.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmgpt.core.config import ConfigError
from mmgpt.plan.hlo import Instruction, Program

_VALUE = re.compile(r"^ value: <\d+ ([\w.\-]+)(\{[\d,]*\})? @0> \(size=(\d+),offset=(\d+)\): (\S+)")
_RANGE = re.compile(r"^\s+([\w.\-]+)(\{[\d,]*\}):(\d+)-(\d+)$")

KINDS = ("parameters", "moments", "average", "batch", "kept activations", "gradients", "gathered weights", "working")
"""In the order in which a picture stacks them: the first four lie there through the whole step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one chip: `held` by kind through the step, and temporary ones by kind at each instruction
    `[instructions]`; `temporary` is the size of the block that they share, `limit` the chip's memory.

    `largest`: the values alive at the peak, largest first, as `(kind, bytes, type, operation)`.
    """

    held: Mapping[str, int]
    over: Mapping[str, np.ndarray]
    temporary: int
    limit: float
    largest: tuple[tuple[str, int, str, str], ...]

    @property
    def total(self) -> int:
        """What the step needs."""
        return sum(self.held.values()) + self.temporary

    @property
    def share(self) -> float:
        """Of the chip's memory."""
        return self.total / self.limit

    def at_peak(self) -> dict[str, int]:
        """Bytes by kind where most are in use; what the block has beyond is told as "between buffers"."""
        alive = np.sum(list(self.over.values()), axis=0)
        peak = int(np.argmax(alive))
        found = {**self.held, **{kind: int(line[peak]) for kind, line in self.over.items()}}
        found["between buffers"] = max(0, self.temporary - int(alive[peak]))
        return {kind: size for kind, size in found.items() if size}


def held(state: Mapping[str, Any], batch: Any) -> dict[str, int]:
    """Bytes of one device's part of a state's shapes and of a batch's."""

    def size(tree: Any) -> int:
        return sum(
            int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
        )

    parameters = {"params": state["params"], "variables": state["variables"]}
    found = {"parameters": size(parameters), "moments": size(state["optimizer"]), "batch": size(batch)}
    return found | ({"average": size(state["ema"])} if "ema" in state else {})


def read(
    folder: Path, program: Program, *, held: Mapping[str, int], temporary: int, limit: float, layers: int, state: Any
) -> Memory:
    """The memory of a program whose dump is in `folder`; ConfigError where the compiler wrote none that can be read."""
    files = [sorted(folder.glob(f"*jit_step*{name}.txt")) for name in ("buffer-assignment", "live-range")]
    if not all(files):
        raise ConfigError(f"{folder}: no dump of the compiler; libtpu 0.0.42 to 0.0.52 write one.")
    assignment, ranges = (found[-1].read_text(errors="replace").splitlines() for found in files)
    places: dict[str, tuple[int, int, str]] = {}
    inside = False
    for line in assignment:
        if line.startswith("allocation"):
            inside = "preallocated-temp" in line and "color" not in line
        elif inside and (found := _VALUE.match(line)):
            places[found[1] + (found[2] or "{}")] = int(found[4]), int(found[3]), found[5]
    gradients = {_shape(leaf) for leaf in jax.tree.leaves(state["params"]) if len(leaf.shape) > 1}
    instructions = {n: i for c in program.computations.values() for n, i in c.items()}
    spans = [m for m in map(_RANGE.match, ranges) if m and f"{m[1]}{m[2]}" in places]
    last = max((int(m[4]) for m in spans), default=0)
    lines = {kind: np.zeros(last + 2, np.int64) for kind in KINDS[4:]}
    by_place: dict[tuple[int, int], list[tuple[int, int, str, str]]] = {}
    for m in spans:
        offset, size, type = places[f"{m[1]}{m[2]}"]
        kind = _kind(instructions.get(m[1]), type, layers, gradients)
        by_place.setdefault((offset, size), []).append((int(m[3]), int(m[4]), kind, f"{m[1]}{m[2]}"))
    for (_, size), values in by_place.items():
        for begin, end, kind in _apart(values):
            lines[kind][begin] += size
            lines[kind][end + 1] -= size
    over = {kind: np.cumsum(line)[:-1] for kind, line in lines.items()}
    peak = int(np.argmax(np.sum(list(over.values()), axis=0))) if last else 0
    alive = []
    for (_, size), values in by_place.items():
        for begin, end, kind, name in values:
            if begin <= peak <= end:
                made = instructions.get(name.split("{")[0])
                alive.append((kind, size, places[name][2], "" if made is None else made.op_name))
    largest = tuple(sorted(set(alive), key=lambda value: -value[1])[:20])
    return Memory(held=held, over=over, temporary=temporary, limit=limit, largest=largest)


def _apart(values: Iterable[tuple[int, int, str, str]]) -> Iterable[tuple[int, int, str]]:
    """Values of one place as spans that do not overlap: where several names stand for one buffer, the first counts."""
    until = -1
    for begin, end, kind, _ in sorted(values):
        if end > until:
            yield max(begin, until + 1), end, kind
            until = end


def _kind(instruction: Instruction | None, type: str, layers: int, gradients: set[str]) -> str:
    found = re.match(r"(\w+)\[([\d,]*)\]", type)
    dims = found[2] if found else ""
    if f"f32[{dims}]" in gradients and found and found[1] == "f32":
        return "gradients"
    if layers > 1 and dims.count(",") >= 2 and dims.split(",")[0] == str(layers):
        return "kept activations"
    if instruction is not None and re.search(r"all-gather|reduce-scatter|all-reduce", instruction.name):
        return "gathered weights"
    return "working"


def _shape(leaf: Any) -> str:
    return f"f32[{','.join(map(str, leaf.sharding.shard_shape(leaf.shape)))}]"
