"""The text of a compiled program: its computations, instructions, sizes, loops, and the lines of code they come from.

`compiled.as_text()` of a TPU program is scheduled: a computation lists its instructions in the order of execution.
"""

import dataclasses
import functools
import math
import re

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+)$")
_OPCODE = re.compile(r"(?:^|\s)([a-z][\w\-]*)\(")
VERBS = "mmgpt/nn/param.py"
_NO_ESTIMATE = 1 << 62
"""The compiler writes the largest integer where it has no estimate."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction: the type that it gives, its operands by name, and the computations it calls by attribute."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    calls: dict[str, str]
    line: str

    @functools.cached_property
    def cycles(self) -> int | None:
        """What the compiler thinks it takes, of a chip with all its cores; None where it does not say."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.line)
        return None if found is None or int(found[1]) >= _NO_ESTIMATE else int(found[1])

    @functools.cached_property
    def op_name(self) -> str:
        """The path of JAX's operations that it was made for."""
        found = re.search(r'op_name="([^"]*)"', self.line)
        return found[1] if found else ""

    @functools.cached_property
    def frame(self) -> int:
        """Number of the stack frame that made it, 0 where none is told."""
        found = re.search(r"stack_frame_id=(\d+)", self.line)
        return int(found[1]) if found else 0


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Source:
    """A line of code."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function}"


@dataclasses.dataclass(frozen=True)
class Program:
    """`computations` by name, the name of the `entry`, and the stack frames: number to (source, parent)."""

    computations: dict[str, Computation]
    entry: str
    frames: dict[int, tuple[Source, int]]

    def source(self, instruction: Instruction) -> Source | None:
        """The innermost line of this package that made an instruction, of the models rather than of the sharding
        verbs that they call; None where none did.
        """
        number, seen, verb = instruction.frame, set(), None
        while number in self.frames and number not in seen:
            seen.add(number)
            source, number = self.frames[number]
            if "/mmgpt/" in source.file and "/jax/" not in source.file:
                found = dataclasses.replace(source, file="mmgpt/" + source.file.rpartition("/mmgpt/")[2])
                if found.file != VERBS:
                    return found
                verb = verb or found
        return verb


def parse(text: str) -> Program:
    """The program of a module's text."""
    found: dict[str, Computation] = {}
    entry, inside = "", None
    for line in _whole_lines(text):
        head = re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            inside = found.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif line == "}":
            inside = None
        elif inside is not None and (instruction := _instruction(line)):
            inside[instruction.name] = instruction
    return Program(found, entry, _frames(text))


def _frames(text: str) -> dict[int, tuple[Source, int]]:
    """The tables of files, functions and frames that stand before the computations."""

    def table(title: str) -> dict[int, str]:
        found = re.search(rf"^{title}\n(.*?)\n\n", text, re.DOTALL | re.MULTILINE)
        rows = [line.split(" ", 1) for line in found[1].splitlines()] if found else []
        return {int(number): rest for number, rest in rows}

    def numbers(row: str) -> dict[str, int]:
        return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", row)}

    files, functions = ({n: s.strip('"') for n, s in table(t).items()} for t in ("FileNames", "FunctionNames"))
    places = {}
    for number, row in table("FileLocations").items():
        at = numbers(row)
        function = functions.get(at["function_name_id"], "").replace(".<locals>", "")
        places[number] = Source(files.get(at["file_name_id"], ""), at["line"], function)
    found = {}
    for number, row in table("StackFrames").items():
        at = numbers(row)
        # The table counts parents from 1, so that a frame without one names itself or none.
        found[number] = places[at["file_location_id"]], at.get("parent_frame_id", 0) - 1
    return found


def _whole_lines(text: str) -> list[str]:
    """Lines of the module; a kernel's metadata may break an instruction, whose rest is joined to it."""
    lines: list[str] = []
    for line in text.splitlines():
        if lines and not re.match(r"^(\s+(ROOT )?%?[\w.\-]+ = |ENTRY |%?[\w.\-]+ \(|\}|HloModule|$)", line):
            lines[-1] += line
        else:
            lines.append(line.rstrip())
    return lines


def _instruction(line: str) -> Instruction | None:
    match = _LINE.match(line)
    opcode = _OPCODE.search(match[2]) if match else None
    if match is None or opcode is None:
        return None
    arguments = _balanced(match[2], opcode.end() - 1)
    rest = match[2][opcode.end() + len(arguments) :]
    calls = dict(re.findall(r"(calls|body|condition|to_apply)=%?([\w.\-]+)", rest))
    for attribute in ("called_computations", "branch_computations"):
        if listed := re.search(rf"{attribute}=\{{([^}}]*)\}}", rest):
            calls |= {f"{attribute}{i}": name.strip().lstrip("%") for i, name in enumerate(listed[1].split(","))}
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    return Instruction(match[1], match[2][: opcode.start()], opcode[1], operands, calls, line)


def _balanced(text: str, opened: int) -> str:
    """What stands inside the bracket that opens there."""
    depth = 0
    for at in range(opened, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return text[opened + 1 : at]
    return text[opened + 1 :]


def size(type: str) -> int:
    """Bytes of the arrays of a type that lie in main memory."""
    total = 0
    for kind, dims, layout in _ARRAY.findall(type):
        if re.search(r"S\([1-9]\d*\)", layout):
            continue
        bits = _BITS.get(kind)
        if bits is None:
            width = re.search(r"\d+", kind)
            bits = int(width[0]) if width else 8
        total += math.prod(int(d) for d in dims.split(",") if d) * bits // 8
    return total


def trips(computations: dict[str, Computation], loop: Instruction) -> int | None:
    """How often a loop runs: the number that its counter is compared with; None where more decides."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.line)
    if known:
        return int(known[1])
    condition = computations[loop.calls["condition"]]
    quiet = ("constant", "parameter", "get-tuple-element")
    numbers = re.findall(r" = s32\[\]\S* constant\((\d+)\)", "\n".join(i.line for i in condition.values()))
    tests = [i for i in condition.values() if i.opcode not in quiet]
    if len(tests) == 1 and tests[0].opcode == "fusion":
        tests = [i for i in computations[tests[0].calls["calls"]].values() if i.opcode not in quiet]
    plain = len(tests) == 1 and tests[0].opcode == "compare" and "direction=LT" in tests[0].line
    return int(numbers[0]) if plain and len(numbers) == 1 else None


def size_of_result(instruction: Instruction) -> int:
    """Bytes of a result wherever it lies."""
    return size(re.sub(r"S\(\d+\)", "", instruction.type))
