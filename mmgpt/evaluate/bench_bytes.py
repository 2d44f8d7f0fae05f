"""Bytes that a compiled program reads from main memory, counted from its scheduled HLO text.

The compiler's own sum counts the body of a loop once; here bodies count as often as they run. What lies in fast memory
(a layout with `S(1)` and above) is not counted, and of an operand that is only sliced or gathered from, the slices are.
"""

import re

from mmgpt.plan.hlo import Computation, Instruction, size, size_of_result, trips

_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "after-all", "copy-done", "partition-id",
    "replica-id", "while", "conditional", "call", "custom-call", "opt-barrier",
}  # fmt: skip
"""Instructions that read nothing themselves; what a loop or call holds is counted in its own computation."""
_SLICES = ("slice", "dynamic-slice", "gather")


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
