"""The time of one step from its scheduled program: each instruction's cycles, loops as often as they run, and what
asynchronous communication hides behind.

The TensorCores execute the instructions of a computation one after another. Transfers execute beside them from the
instruction that issues them on, one after another too on each of three channels: the torus' links, the network between
slices, the way to the host's memory. Where the program needs one that has not ended yet, it waits: that is exposed
communication. A loop is timed in its second turn, since its first finds idle channels.

Cycles are the compiler's own estimates, with these corrections, and no others:

- attention kernels have no estimate: their time comes from their schedules and the blocks visited (`attention.py`);
- nor have the kernels that only turn heads round, or norm them or add them up: theirs is that of moving their bytes;
- an array filled with one number is timed by its bytes and the memory's bandwidth: the compiler's estimate is ten times
  that;
- transfers are timed by bytes and links (`collectives.py`); gathers of rows that run on the SparseCores by bytes and
  memory.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from mmgpt.plan.chips import Chip
from mmgpt.plan.collectives import Collective, Torus, found_in
from mmgpt.plan.hlo import Computation, Instruction, Program, size_of_result, trips
from mmgpt.plan.hlo import size as size_on_chip

ISSUES = ("-start", "-update", "recv", "send")
"""Ends of the names of instructions that issue a transfer and do not wait for it."""

HOST = "S(5)"
"""How a type says that an array lies in the host's memory."""

Work = Literal["products", "attention", "heads", "other", "filling arrays", "a loop", "waiting for communication"]
Phase = Literal["forward", "recomputation", "backward", "update", "copies of the compiler"]
WAITING: Work = "waiting for communication"

KernelTime = Callable[[Instruction], float | None]
"""Seconds of a custom call, None where it is no kernel that is known."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """One instruction's seconds: `row` is "cores", or the channel that carries a transfer.

    `what` is the kind of work or of communication, `name` the instruction's or the line that asked for the latter.
    """

    begin: float
    seconds: float
    what: str
    phase: str
    name: str
    row: str = "cores"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """A turn of a loop, of which a step makes `times`; a loop inside it is one piece. Transfers may outlast it."""

    times: float
    seconds: float
    pieces: tuple[Piece, ...]


@dataclasses.dataclass
class Told:
    """What the simulation found: seconds by what and phase, and each transfer with the seconds that were waited."""

    seconds: float = 0.0
    by_what: dict[str, float] = dataclasses.field(default_factory=lambda: collections.defaultdict(float))
    by_phase: dict[str, float] = dataclasses.field(default_factory=lambda: collections.defaultdict(float))
    transfers: list[tuple[Collective, float, float]] = dataclasses.field(default_factory=list)
    """A collective, how often it runs, and the seconds waited for each."""
    in_layers: list[bool] = dataclasses.field(default_factory=list)
    """Of each of them, whether it is in a loop over layers."""
    unknown: dict[str, int] = dataclasses.field(default_factory=lambda: collections.defaultdict(int))
    """Custom calls without any time, and how often they run."""
    largest: dict[str, float] = dataclasses.field(default_factory=lambda: collections.defaultdict(float))
    """Seconds by instruction."""
    by_part: dict[tuple[str, str], float] = dataclasses.field(default_factory=lambda: collections.defaultdict(float))
    """Seconds by phase and what; waiting has no phase."""
    turns: dict[str, Turn] = dataclasses.field(default_factory=dict)
    """A settled turn of each loop, by the name of its body."""

    @property
    def exposed(self) -> float:
        """Seconds of waiting for communication."""
        return self.by_what[WAITING]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Within:
    """Where an instruction is told: `times` in a step, in so many `loops`, and among `pieces` from `at` on."""

    told: Told
    times: float = 1.0
    loops: int = 0
    of_layers: bool = False
    """Whether one of those loops is over layers."""
    at: float = 0.0
    pieces: list[Piece] = dataclasses.field(default_factory=list)

    def later(self, seconds: float) -> "_Within":
        return dataclasses.replace(self, at=self.at + seconds)


class Busy(NamedTuple):
    """Until when each channel is busy, in seconds from where a computation begins."""

    links: float = 0.0
    network: float = 0.0
    host: float = 0.0

    def after(self, seconds: float) -> "Busy":
        """The same, seen from so much later."""
        return Busy(*(until - seconds for until in self))

    def with_(self, begun: list[Collective], now: float) -> tuple["Busy", float]:
        """The same with transfers of one channel that are issued now, and when they end."""
        channel = begun[0].channel
        end = max(getattr(self, channel), now) + sum(c.seconds for c in begun)
        return self._replace(**{channel: end}), end


def phase_of(op_name: str) -> Phase:
    """Which part of the step an operation belongs to."""
    if "rematted_computation" in op_name:
        return "recomputation"
    if "transpose(" in op_name:
        return "backward"
    if not op_name:
        return "copies of the compiler"
    return "forward" if "jvp(" in op_name else "update"


class Schedule:
    """Times the program of one chip; `microbatched`: there is a loop around those over layers."""

    def __init__(self, program: Program, chip: Chip, torus: Torus, kernels: KernelTime, *, microbatched: bool = False):
        self.program, self.chip, self.torus, self.kernels = program, chip, torus, kernels
        self.microbatched = microbatched
        self._products: dict[str, bool] = {}

    def told(self) -> Told:
        told = Told()
        told.seconds = self._run(self.program.entry, Busy(), _Within(told=told))[0]
        return told

    def _run(self, name: str, busy: Busy, within: _Within) -> tuple[float, Busy]:
        """Seconds of a computation that finds channels busy, and how it leaves them, seen from its end."""
        computation, now = self.program.computations[name], 0.0
        ends: dict[str, tuple[float, list[Collective]]] = {}
        for instruction in computation.values():
            opcode, here = instruction.opcode, within.later(now)
            if opcode in ("while", "call", "conditional"):
                spent, left = self._inner(instruction, busy.after(now), here)
                now += spent
                busy = left.after(-now)
            elif opcode.endswith("-done") and instruction.operands[0] in ends:
                end, begun = ends[instruction.operands[0]]
                now += self._waited(end - now, begun, here)
            elif begun := self._begun(computation, instruction):
                if not self._updated(computation, instruction):
                    busy, end = busy.with_(begun, now)
                    ends[instruction.name] = end, begun
                    within.pieces.append(_carried(begun, within.at + end))
                    if not opcode.endswith(ISSUES) and opcode not in ISSUES:
                        now += self._waited(end - now, begun, here)
            else:
                now += self._worked(instruction, here)
        return now, busy.after(now)

    def _inner(self, instruction: Instruction, busy: Busy, within: _Within) -> tuple[float, Busy]:
        """`_run` of what an instruction calls: a loop's turns, the longest branch, all that it calls."""
        if instruction.opcode == "conditional":
            branches = [c for key, c in instruction.calls.items() if key.startswith("branch")]
            longest = max(branches, key=lambda c: self._run(c, Busy(), _Within(told=Told(), times=0.0))[0])
            return self._run(longest, busy, within)
        if instruction.opcode == "call":
            spent = 0.0
            for called in instruction.calls.values():
                more, busy = self._run(called, busy, within.later(spent))
                spent += more
            return spent, busy
        turns = trips(self.program.computations, instruction) or 1
        body, told, times = instruction.calls["body"], within.told, within.times
        of_layers = within.loops > 0 or not (self.microbatched and self._loops_inside_move(body))
        looped = {"of_layers": of_layers, "loops": within.loops + 1}
        inside = _Within(told=told, times=times, **looped)
        each, busy = self._run(body, busy, inside)
        seconds = each
        if turns > 1:
            inside = _Within(told=told, times=times * (turns - 1), **looped)
            each, busy = self._run(body, busy, inside)
            seconds += each * (turns - 1)
        before = told.turns[body].times if body in told.turns else 0.0  # in another turn of a loop around this one
        told.turns[body] = Turn(times=before + times * turns, seconds=each, pieces=tuple(inside.pieces))
        within.pieces.append(Piece(begin=within.at, seconds=seconds, what="a loop", phase="", name=instruction.name))
        return seconds, busy

    def _loops_inside_move(self, body: str) -> bool:
        """Whether there are loops in a loop that move anything: it may go over microbatches then, not over layers."""
        inside = self.program.computations[body].values()
        return any(i.opcode == "while" and found_in(self.program, i) for i in inside)

    def _begun(self, computation: Computation, instruction: Instruction) -> list[Collective]:
        """What an instruction issues; what the compiler put in is told by the line that made what it moves."""
        if instruction.opcode == "recv" or HOST in instruction.type:
            return self._away(instruction)
        update = instruction.opcode.endswith("-update")
        issued = computation.get(instruction.operands[0], instruction) if update else instruction
        made = [self.torus.collective(self.program, i) for i in found_in(self.program, issued)]
        moved = [maker for name in instruction.operands if (maker := self._maker(computation, name)) is not None]
        return [
            c if c.source or not moved else dataclasses.replace(c, source=self.program.source(moved[0])) for c in made
        ]

    def _away(self, instruction: Instruction) -> list[Collective]:
        """What leaves the slice or the chip: the other slices' part of a sum, an array to or from the host's memory."""
        between = "xla_megascale_runtime" in instruction.line
        if not between and not instruction.opcode.endswith("-start"):
            return []
        size = size_of_result(instruction) if between else size_on_chip(instruction.type)  # it names both ends
        slices = self.torus.sides[-1]
        passes = 2 * (slices - 1) / slices if between else 1.0
        what = Collective(
            kind="sum between slices" if between else "host copy",
            name=instruction.name,
            group=slices if between else 1,
            links=1,
            bytes=size,
            seconds=passes * size / (self.chip.network if between else self.chip.host),
            op_name=instruction.op_name,
            source=self.program.source(instruction),
            channel="network" if between else "host",
        )
        return [what]

    def _maker(self, computation: Computation, name: str) -> Instruction | None:
        """The instruction that made a value, behind what only renames it; None where no line of ours did.

        What a loop is handed was made in its turn before.
        """
        seen: set[str] = set()
        while (found := computation.get(name)) is not None and name not in seen:
            seen.add(name)
            if self.program.source(found) is not None:
                return found
            if found.opcode not in ("get-tuple-element", "bitcast", "copy", "copy-done", "copy-start", "tuple"):
                return None
            name = found.operands[0]
            handed, root = computation.get(name), list(computation.values())[-1]
            if found.opcode == "get-tuple-element" and handed is not None and handed.opcode == "parameter":
                index = re.search(r"index=(\d+)", found.line)
                if index is None or root.opcode != "tuple" or int(index[1]) >= len(root.operands):
                    return None
                name = root.operands[int(index[1])]
        return None

    @staticmethod
    def _updated(computation: Computation, instruction: Instruction) -> bool:
        """Whether another instruction issues what this one prepares."""
        return any(
            i.opcode.endswith("-update") and instruction.name in i.operands[:1] for i in computation.values()
        ) and instruction.opcode.endswith("-start")

    def _waited(self, seconds: float, made: list[Collective], within: _Within) -> float:
        told, times, wait = within.told, within.times, max(0.0, seconds)
        told.by_what[WAITING] += wait * times
        told.by_part["", WAITING] += wait * times
        within.pieces.append(Piece(begin=within.at, seconds=wait, what=WAITING, phase="", name=""))
        whole = sum(c.seconds for c in made)
        for c in made:
            told.transfers.append((c, times, wait * (c.seconds / whole if whole else 0.0)))
            told.in_layers.append(within.of_layers)
        return wait

    def _worked(self, instruction: Instruction, within: _Within) -> float:
        told, times, name = within.told, within.times, instruction.name
        if instruction.opcode == "custom-call":
            seconds = self.kernels(instruction)
            if seconds is None:
                if "tpu_custom_call" in instruction.line:
                    told.unknown[name] += int(times)
                return 0.0
            what: Work = "attention" if re.search("attention_(forward|backward)", instruction.name) else "heads"
        elif instruction.opcode == "broadcast":
            seconds, what = size_of_result(instruction) / self.chip.bandwidth, "filling arrays"
        else:
            seconds = (instruction.cycles or 0) / self.chip.clock
            what = "products" if self._multiplies(instruction) else "other"
        phase = phase_of(instruction.op_name)
        told.by_what[what] += seconds * times
        told.by_phase[phase] += seconds * times
        told.by_part[phase, what] += seconds * times
        told.largest[name] += seconds * times
        within.pieces.append(Piece(begin=within.at, seconds=seconds, what=what, phase=phase, name=name))
        return seconds

    def _multiplies(self, instruction: Instruction) -> bool:
        if instruction.opcode in ("convolution", "dot"):
            return True
        called = instruction.calls.get("calls")
        if called is None:
            return False
        if called not in self._products:
            inner = self.program.computations.get(called, {}).values()
            self._products[called] = any(self._multiplies(i) for i in inner)
        return self._products[called]


def _carried(begun: list[Collective], end: float) -> Piece:
    """Transfers that are issued together and end then."""
    seconds, c = sum(c.seconds for c in begun), begun[0]
    name = f"{c.source or c.op_name or c.name}"
    return Piece(begin=end - seconds, seconds=seconds, what=c.kind, phase="", name=name, row=c.channel)


def exposed_bytes(told: Told) -> tuple[float, float]:
    """Bytes of communication in the layers, and those of them that were waited for (each by the share of its time)."""
    total = waited = 0.0
    for (c, times, wait), in_layers in zip(told.transfers, told.in_layers, strict=True):
        if in_layers:
            total += c.bytes * times
            waited += c.bytes * times * (min(1.0, wait / c.seconds) if c.seconds else 0.0)
    return total, waited


def kernel_name(instruction: Instruction) -> str:
    """The name that a Pallas kernel was given."""
    found = re.search(r"(attention_\w+?)(?:\.\d+)?$", instruction.name)
    return found[1] if found else instruction.name


def by_source(told: Told) -> Mapping[str, tuple[float, float, float]]:
    """`(runs, bytes, seconds waited)` of communication by kind and the line that asked for it."""
    found: dict[str, tuple[float, float, float]] = {}
    for c, times, wait in told.transfers:
        key = f"{c.kind} over {c.group}: {c.source or c.op_name or c.name}"
        runs, size, waited = found.get(key, (0.0, 0.0, 0.0))
        found[key] = runs + times, size + c.bytes * times, waited + wait * times
    return found
