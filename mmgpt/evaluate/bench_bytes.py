"""Bytes that a compiled program reads from main memory, counted from its scheduled HLO text.

The compiler's own sum counts the body of a loop once; here bodies count as often as they run. What lies in fast memory
(a layout with `S(1)` and above) is not counted, and of an operand that is only sliced or gathered from, the slices are.
"""

import dataclasses
import math
import re

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+)$")
_OPCODE = re.compile(r"(?:^|\s)([a-z][\w\-]*)\(")
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "after-all", "copy-done", "partition-id",
    "replica-id", "while", "conditional", "call", "custom-call", "opt-barrier",
}  # fmt: skip
"""Instructions that read nothing themselves; what a loop or call holds is counted in its own computation."""
_SLICES = ("slice", "dynamic-slice", "gather")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction: the type that it gives, its operands by name, and the computations it calls by attribute."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    calls: dict[str, str]
    line: str


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a module by name, and the name of the entry."""
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
    return found, entry


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


def bytes_read(computations: dict[str, Computation], name: str) -> int:
    """Bytes that a computation reads, loops inside it as often as they run (once where that depends on data)."""
    computation, total = computations[name], 0
    for instruction in computation.values():
        if instruction.opcode == "while":
            body = bytes_read(computations, instruction.calls["body"])
            total += (trips(computations, instruction) or 1) * body
        elif instruction.opcode in ("call", "async-start") and instruction.calls:
            total += sum(bytes_read(computations, called) for called in instruction.calls.values())
        elif instruction.opcode not in _FREE and not instruction.opcode.endswith("-done"):
            total += _read(computations, computation, instruction)
    return total


def _read(computations: dict[str, Computation], computation: Computation, instruction: Instruction) -> int:
    whole = [size(computation[o].type) if o in computation else 0 for o in instruction.operands]
    if instruction.opcode in _SLICES:
        return min(whole[0], size_of_result(instruction)) + sum(whole[1:])
    if instruction.opcode == "dynamic-update-slice":
        return sum(whole[1:])
    if instruction.opcode != "fusion":
        return sum(whole)
    inner = computations[instruction.calls["calls"]]
    taken = {number: _taken(computations, inner, parameter) for number, parameter in _parameters(inner).items()}
    return sum(
        0 if bytes == 0 else bytes if taken.get(i) is None else min(bytes, taken[i] or 0)
        for i, bytes in enumerate(whole)
    )


def size_of_result(instruction: Instruction) -> int:
    """Bytes of a result wherever it lies."""
    return size(re.sub(r"S\(\d+\)", "", instruction.type))


def _parameters(computation: Computation) -> dict[int, str]:
    found = {}
    for instruction in computation.values():
        if instruction.opcode == "parameter":
            number = re.search(r"parameter\((\d+)\)", instruction.line)
            assert number is not None
            found[int(number[1])] = instruction.name
    return found


def _taken(computations: dict[str, Computation], computation: Computation, name: str) -> int | None:
    """Bytes that are read of a value inside a fusion, where only slices are or it is written to; None: all of it."""
    total = 0
    if computation[name].line.lstrip().startswith("ROOT"):  # it goes on as it is
        return None
    for user in computation.values():
        if name not in user.operands:
            continue
        if user.opcode in _SLICES and user.operands[0] == name and name not in user.operands[1:]:
            total += size_of_result(user)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            continue
        elif user.opcode == "bitcast":
            inner = _taken(computations, computation, user.name)
            if inner is None:
                return None
            total += inner
        elif user.opcode == "fusion":
            called = computations[user.calls["calls"]]
            for place, operand in enumerate(user.operands):
                inner = _taken(computations, called, _parameters(called)[place]) if operand == name else 0
                if inner is None:
                    return None
                total += inner
        else:
            return None
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


def decoding_loop(computations: dict[str, Computation], entry: str) -> str:
    """The body of the one outer loop of the entry whose length depends on data: a decoding loop."""

    def loops(name: str) -> list[Instruction]:
        found = [i for i in computations[name].values() if i.opcode == "while"]
        called = [c for i in computations[name].values() if i.opcode == "call" for c in i.calls.values()]
        return found + [loop for name in called for loop in loops(name)]

    bodies = [loop.calls["body"] for loop in loops(entry) if trips(computations, loop) is None]
    if len(bodies) != 1:
        raise ValueError(f"expected one loop of unknown length in {entry}, found {len(bodies)}.")
    return bodies[0]
