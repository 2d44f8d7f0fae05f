"""Decodes mutants in a process of its own, which a fault of a C library may end: `python -m tests.fuzz.worker`.

Reads lines "FIRST STOP" and answers each with a line of JSON; before each mutant its number goes to the status file.
"""

import collections
import importlib
import json
import os
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

from tests.fuzz.decoders import NAMED
from tests.fuzz.mutate import mutant


def memory(field: str) -> int:
    """`VmRSS` or `VmHWM` (its peak) of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def main(module: str, name: str, seed: int, status: str) -> None:
    decoder = importlib.import_module(module).DECODERS[name]
    files = decoder.files()
    for data in files:
        assert decoder.decode(data) == "decoded", f"{name}: a sound file does not decode"
    lasting, peak = memory("VmRSS"), memory("VmHWM")
    place = os.open(status, os.O_WRONLY | os.O_CREAT)
    print(json.dumps({"files": len(files)}), flush=True)
    for line in sys.stdin:
        outcomes: collections.Counter[str] = collections.Counter()
        faults: list[dict[str, Any]] = []
        slowest, at = 0.0, -1
        for number in range(*map(int, line.split())):
            os.pwrite(place, b"%020d" % number, 0)
            data = mutant(files, seed, number, decoder.repair)
            begun = time.process_time()  # of this process: a busy machine is no fault
            try:
                outcome = decoder.decode(data)
            except NAMED as e:
                outcome = getattr(e, "reason", type(e).__name__)
            except BaseException:
                outcome = "fault"
                faults.append({"number": number, "what": traceback.format_exc(limit=-3)})
            outcomes[outcome] += 1
            if (took := time.process_time() - begun) > slowest:
                slowest, at = took, number
        told = {"outcomes": outcomes, "faults": faults, "slowest": slowest, "slowest_number": at}
        print(json.dumps(told | {"lasting": memory("VmRSS") - lasting, "peak": memory("VmHWM") - peak}), flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
