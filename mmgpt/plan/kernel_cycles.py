"""Cycles of a TPU kernel from the compiler's dump, without a TPU: bundles, MXU occupancy, and in-order issue.

`LIBTPU_INIT_ARGS='--xla_jf_dump_to=DIR --xla_jf_dump_llo_text=true'` makes the compiler write, for each kernel,
`*-final_bundles.txt` (instructions in bundles, in the order of issue, with the regions of the program, loops, branches)
and `*-final_hlo-static-per-bundle-utilization.txt` (the units that each bundle uses).

Method. A bundle takes a cycle at least. A `vmatmul` holds its MXU for rows / rows a cycle, where rows are 8 (float32),
16 (bfloat16) or 32 (8 bits) and rows a cycle follow from the chip's published peak, so that no figure can exceed it;
an MXU queues two. Bundles issue in order and wait while a queue is full. Not modelled: waiting for memory (compare the
bytes of a grid step with the bandwidth), stalls of result queues, throttling: the cycles are a lower bound, about 0.7
to 1.0 of measured ones, and what to trust is the ratio of two kernels on one chip.

Checks (libtpu 0.0.52, jax 0.12.0.1): a matmul of 4096^3 comes out 2 % below the compiler's own estimate on v5e and v5p,
11 and 17 % on v6e and v7x; tokamax's splash attention on v7x at 39 and 62 to 65 % of the peak for head dims of 128 and
256 (published: 34 and 63 %), its backward pass at 49 and 95 % (published: 37 and 72 %).

A Pallas kernel is one loop over the grid, whose exit test holds the steps of a core + 2 where the grid is static. What
a `pl.when` guards lies behind a branch: such parts with matmuls are the *bodies*, those without are initial values,
results and transfers, and what no branch skips is the overhead of every step.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from mmgpt.core.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Chip:
    """`clock` GHz, `peak` bfloat16 TFLOP/s of a core, `mxus` of a core and their side, `cores` of a device."""

    clock: float
    peak: float
    mxus: int
    side: int
    cores: int

    @property
    def flops_per_cycle(self) -> float:
        """Of one core, in bfloat16."""
        return self.peak * 1e3 / self.clock

    @property
    def rows_per_cycle(self) -> float:
        """Rows that one MXU takes in a cycle."""
        return self.flops_per_cycle / (2 * self.side**2 * self.mxus)


TARGETS = {
    "v4": Chip(1.05, 137.5, 4, 128, 2),
    "v5e": Chip(1.50, 197.0, 4, 128, 1),
    "v5p": Chip(1.75, 229.5, 4, 128, 2),
    "v6e": Chip(1.75, 918.0, 2, 256, 1),
    "v7x": Chip(2.20, 1153.5, 2, 256, 1),
}
"""Peaks as published; the clock of v7x is inferred from its peak at 2 rows a cycle. One core of a v7x is a device of
JAX, while the two of a v4 or v5p are one together."""

QUEUE = 2
"""Matmuls that an MXU holds before a bundle with another must wait."""
DELAY = 4
"""Bundles behind a branch that are issued whether it is taken or not."""

BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:\s*(?:>\s*)*\{")
REGION = re.compile(r"Start/End empty region (\d+)|Start region (\d+)|End region (\d+)")
MATMUL = re.compile(r"vmatmul\.([a-z0-9.]*?)(?:mrb\[\d+\]\.)?mxu(\d)")
EXIT = re.compile(r"scmp\.ge\.s32\.totalorder %\S+, (\d+) /\* loop exit test")
BRANCH = re.compile(r"sbr\.rel (?:\((\S+)\) )?target = \$region(\d+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Of a part of a kernel, run once: loops in it run as often as they do there.

    `mxu_busy`: cycles of the busiest MXU; `sim`: cycles in all; `slots`: uses of each unit; `fills`, `spills`: of those
    the loads and stores that only make up for too few registers.
    """

    bundles: float
    matmuls: float
    mxu_busy: float
    sim: float
    slots: dict[str, float]

    @property
    def fills(self) -> float:
        return self.slots.get("VLOAD:FILL", 0)

    @property
    def spills(self) -> float:
        return self.slots.get("VSTORE:SPILL", 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Bundles `first` to `last`, and what they cost."""

    first: int
    last: int
    cost: Cost


@dataclasses.dataclass(frozen=True)
class Loop:
    """Bundles `first` to `last`; `exit`: the constant in the exit test, None where it is a value of the program."""

    first: int
    last: int
    exit: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """`regions`: the dump's own, by name as R83, without what is nested in them. `parts`: what a branch may skip, in
    the order of the program. `step`: what every step runs. `grid`: the loop over steps."""

    name: str
    bundles: int
    regions: dict[str, Cost]
    loops: tuple[Loop, ...]
    grid: Loop | None
    step: Cost
    parts: tuple[Part, ...]

    @property
    def bodies(self) -> tuple[Part, ...]:
        """The parts with matmuls."""
        return tuple(part for part in self.parts if part.cost.matmuls)

    @property
    def steps(self) -> int | None:
        """Grid steps of one core, where the grid is static."""
        return None if self.grid is None or self.grid.exit is None else self.grid.exit - 2

    @property
    def row(self) -> float:
        """Cycles of the parts without matmuls, each once."""
        return sum(part.cost.sim for part in self.parts if not part.cost.matmuls)


def read_all(folder: Path, chip: Chip, name: str = "") -> tuple[Kernel, ...]:
    """The kernels of a dump whose name holds `name`, in the order of their compilation."""
    found = []
    for path in sorted(folder.glob("*-final_bundles.txt")):
        stem = path.name.removesuffix("-final_bundles.txt")
        if "schedule-analysis" in stem or "late-" in stem or name not in stem:
            continue
        tables = sorted(folder.glob(f"{stem.rpartition('-')[0]}-*-final_hlo-static-per-bundle-utilization.txt"))
        found.append(read(path, chip, tables[0] if tables else None))
    return tuple(found)


def read(path: Path, chip: Chip, utilization: Path | None = None) -> Kernel:
    """The kernel of one `*-final_bundles.txt`, with the units of `utilization`. ConfigError where there is none."""
    bundles = _bundles(path.read_text(errors="replace").splitlines())
    if not bundles:
        raise ConfigError(f"{path}: no bundles; dumps of libtpu 0.0.52 have them, another version may write them anew.")
    slots = [] if utilization is None else _slots(utilization.read_text().splitlines())
    program = _Program(bundles, slots if len(slots) == len(bundles) else [], chip)
    grid = program.grid()
    spans = program.spans(grid)
    skipped = {i for first, last in spans for i in range(first, last + 1)}
    inside = range(grid.first, grid.last + 1) if grid else range(len(bundles))
    return Kernel(
        name=re.sub(r"^\d+-", "", path.name).rsplit("-", 2)[0],
        bundles=len(bundles),
        regions={name: program.cost(indices, grid) for name, indices in program.regions().items()},
        loops=program.loops,
        grid=grid,
        step=program.cost([i for i in inside if i not in skipped], grid),
        parts=tuple(
            Part(first=first, last=last, cost=program.cost(range(first, last + 1), grid)) for first, last in spans
        ),
    )


def rows_of(instruction: str) -> int:
    """Rows of one `vmatmul`, by the type in its name."""
    if "bf16" in instruction:
        return 16
    if "f32" in instruction:
        return 8
    if re.search(r"(^|\.)(s8|u8|f8|e4m3|e5m2|x8)", instruction):
        return 32
    return 64 if re.search(r"(^|\.)(s4|u4)", instruction) else 16


def _bundles(lines: Iterable[str]) -> list[str]:
    found: list[list[str]] = []
    for line in lines:
        if BUNDLE.match(line):
            found.append([line])
        elif found:
            found[-1].append(line)
    return ["\n".join(bundle) for bundle in found]


def _slots(lines: Sequence[str]) -> list[dict[str, int]]:
    """Uses of each unit, a bundle: the second line names the columns, the fifth is the first bundle's."""
    names = [name.strip() for name in lines[1].split(",")]
    return [dict(zip(names, map(int, line.split()), strict=True)) for line in lines[4:] if line.strip()]


class _Program:
    """The bundles of a kernel with their matmuls, regions, branches and loops."""

    def __init__(self, bundles: list[str], slots: list[dict[str, int]], chip: Chip):
        self.count, self.slots, self.chip = len(bundles), slots, chip
        self.matmuls = [[(int(m[2]), rows_of(m[1])) for m in MATMUL.finditer(text)] for text in bundles]
        self.start: dict[int, int] = {}
        self.end: dict[int, int] = {}
        branches: list[tuple[int, int]] = []
        exits: dict[int, int] = {}
        for i, text in enumerate(bundles):
            for match in REGION.finditer(text):
                empty, start, end = (None if n is None else int(n) for n in match.groups())
                for number in (empty, start):
                    if number is not None:
                        self.start.setdefault(number, i)
                for number in (empty, end):
                    if number is not None:
                        self.end[number] = i
            branches += [(i, int(m[2])) for m in BRANCH.finditer(text)]
            if test := EXIT.search(text):
                exits[i] = int(test[1])
        known = [(i, self.start[target]) for i, target in branches if target in self.start]
        self.forward = [(i + DELAY + 1, to - 1) for i, to in known if to > i + DELAY + 1]
        self.loops = self._loops([(to, min(i + DELAY, self.count - 1)) for i, to in known if to <= i], exits)

    def _loops(self, ends: list[tuple[int, int]], exits: dict[int, int]) -> tuple[Loop, ...]:
        """Inner loops first, so that each exit test goes to the innermost loop around it."""
        found, left = [], dict(exits)
        for first, last in sorted(ends, key=lambda span: span[1] - span[0]):
            inside = [i for i in left if first <= i <= last]
            found.append(Loop(first, last, left[inside[-1]] if inside else None))
            for i in inside:
                del left[i]
        return tuple(found)

    def grid(self) -> Loop | None:
        """The smallest loop with all matmuls and a branch in it; the largest of all where none has them."""
        used = [i for i, matmuls in enumerate(self.matmuls) if matmuls]
        for loop in self.loops:
            around = bool(used) and loop.first <= used[0] and used[-1] <= loop.last
            if around and any(loop.first <= first and last <= loop.last for first, last in self.forward):
                return loop
        return self.loops[-1] if self.loops else None

    def spans(self, grid: Loop | None) -> list[tuple[int, int]]:
        """What branches in the grid loop skip: the outermost spans that leave the bodies apart, in order.

        A span around several bodies, or around one with other guarded parts beside it, is the step itself.
        """
        low, high = (grid.first, grid.last) if grid else (0, self.count - 1)
        inside = sorted({(a, b) for a, b in self.forward if low <= a and b <= high}, key=lambda s: (s[0], -s[1]))

        def own(span: tuple[int, int]) -> bool:
            inner = [s for s in inside if s != span and span[0] <= s[0] and s[1] <= span[1]]
            covered = {i for a, b in inner for i in range(a, b + 1)}
            return any(self.matmuls[i] for i in range(span[0], span[1] + 1) if i not in covered)

        def heavy(span: tuple[int, int]) -> bool:
            return any(self.matmuls[i] for i in range(span[0], span[1] + 1))

        whole = [s for s in inside if own(s) or not heavy(s)]
        return [s for s in whole if not any(o != s and o[0] <= s[0] and s[1] <= o[1] for o in whole)]

    def regions(self) -> dict[str, list[int]]:
        """The bundles of each region that no region nested in it holds; `top` has those of none."""
        owner: list[str] = ["top"] * self.count
        ended = [n for n in self.start if n in self.end]
        for number in sorted(ended, key=lambda n: self.start[n] - self.end[n]):
            for i in range(self.start[number], self.end[number] + 1):
                owner[i] = f"R{number}"
        found: dict[str, list[int]] = {}
        for i, name in enumerate(owner):
            found.setdefault(name, []).append(i)
        return found

    def cost(self, indices: Iterable[int], grid: Loop | None) -> Cost:
        """Stretches between the ends of loops are simulated one by one, and count as often as their loops run."""
        stretches: list[tuple[float, list[int]]] = []
        for i in indices:
            around = [loop for loop in self.loops if loop.first <= i <= loop.last and self._inner(loop, grid)]
            times = float(math.prod(loop.exit or 1 for loop in around))
            if not stretches or stretches[-1][0] != times:
                stretches.append((times, []))
            stretches[-1][1].append(i)

        total: dict[str, float] = collections.defaultdict(float)
        slots: dict[str, float] = collections.defaultdict(float)
        for times, run in stretches:
            sim, busy = self._simulated(run)
            total["bundles"] += times * len(run)
            total["matmuls"] += times * sum(len(self.matmuls[i]) for i in run)
            total["sim"] += times * max(sim, busy)
            total["busy"] += times * busy
            for i in run if self.slots else ():
                for name, used in self.slots[i].items():
                    slots[name] += times * used
        return Cost(
            bundles=total["bundles"],
            matmuls=total["matmuls"],
            mxu_busy=total["busy"],
            sim=total["sim"],
            slots=dict(slots),
        )

    @staticmethod
    def _inner(loop: Loop, grid: Loop | None) -> bool:
        return loop is not grid and (grid is None or (grid.first <= loop.first and loop.last <= grid.last))

    def _simulated(self, run: Sequence[int]) -> tuple[float, float]:
        """Cycles in which the bundles are issued, and those of the busiest MXU."""
        now = 0.0
        free: dict[int, float] = collections.defaultdict(float)
        busy: dict[int, float] = collections.defaultdict(float)
        for i in run:
            now += 1
            for mxu, rows in self.matmuls[i]:
                service = rows / (self.chip.rows_per_cycle * (2 if rows >= 32 else 1))
                now = max(now, free[mxu] - service * (QUEUE - 1))
                free[mxu] = max(free[mxu], now) + service
                busy[mxu] += service
        return now, max(busy.values(), default=0.0)
