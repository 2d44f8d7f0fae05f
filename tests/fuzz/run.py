"""Decodes many mutants of each format and reports what came of them.

    python -m tests.fuzz.run --mutants 100000 --decoders jpeg,png --seed 0 --out report.json

A fault is any outcome but a decoded file or a named error: another exception, the end of the process, an item that
takes over 2 s of CPU time or stands still, memory that grows by over 200 MB, or an item that takes 400 MB. Each is
told with its seed and number; `--show N` with one decoder writes that mutant to stdout.
"""

import argparse
import collections
import dataclasses
import json
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.fuzz.decoders import DECODERS
from tests.fuzz.mutate import mutant

SECONDS = 2.0
LASTING, PEAK = 200 << 20, 400 << 20
"""Bytes. WebP takes the most: five buffers of 4 bytes a pixel, 320 MB at the cap of pixels."""
STILL = 60.0
"""Seconds in which no mutant ends: the worker hangs."""
CHUNK = 200


@dataclasses.dataclass
class Report:
    """What came of the mutants of a decoder."""

    decoder: str
    seed: int
    mutants: int = 0
    outcomes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    faults: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    slowest: float = 0.0
    slowest_number: int = -1
    lasting: int = 0
    peak: int = 0
    seconds: float = 0.0


class Worker:
    """A process that decodes mutants; `chunk` returns what it says, or the number at which it died and how."""

    def __init__(self, module: str, decoder: str, seed: int, folder: Path) -> None:
        self._status = folder / "status"
        command = [sys.executable, "-m", "tests.fuzz.worker", module, decoder, str(seed), str(self._status)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        told = self._line(STILL)
        if "died" in told:
            raise RuntimeError(f"{decoder}: the worker does not start: {told['how']}")

    def chunk(self, first: int, stop: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._status.write_bytes(b"%020d" % first)
        self._process.stdin.write(b"%d %d\n" % (first, stop))
        self._process.stdin.flush()
        return self._line(STILL)

    def _line(self, patience: float) -> dict[str, Any]:
        assert self._process.stdout is not None and self._process.stderr is not None
        number, since = -1, time.monotonic()
        while not select.select([self._process.stdout], [], [], 1.0)[0]:
            now = self._number()
            if now != number:
                number, since = now, time.monotonic()
            if time.monotonic() - since > patience:
                self.close()
                return {"died": self._number(), "how": f"stood still for {patience:.0f} s"}
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        said = self._process.stderr.read().decode(errors="replace")[-2000:]
        code = self._process.wait()
        return {"died": self._number(), "how": f"the process ended with {code}: {said}"}

    def _number(self) -> int:
        return int(self._status.read_bytes() or b"-1") if self._status.exists() else -1

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()
        self._process.kill()
        self._process.wait()


def fuzz(
    decoder: str, mutants: int, seed: int, seconds: float = float("inf"), module: str = "tests.fuzz.decoders"
) -> Report:
    """Decodes mutants 0 to `mutants` - 1 of a seed, fewer where the time runs out."""
    report = Report(decoder=decoder, seed=seed)
    begun = time.monotonic()
    todo = collections.deque((n, min(n + CHUNK, mutants)) for n in range(0, mutants, CHUNK))
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        worker = Worker(module, decoder, seed, Path(folder))
        while todo and time.monotonic() - begun < seconds:
            first, stop = todo.popleft()
            told = worker.chunk(first, stop)
            if "died" in told:
                died = told["died"]
                report.faults.append({"number": died, "what": told["how"]})
                report.mutants += 1
                todo.extendleft(part for part in ((died + 1, stop), (first, died)) if part[0] < part[1])
                worker.close()
                worker = Worker(module, decoder, seed, Path(folder))
                continue
            report.mutants += stop - first
            report.outcomes.update(told["outcomes"])
            report.faults += told["faults"]
            report.lasting, report.peak = max(report.lasting, told["lasting"]), max(report.peak, told["peak"])
            if told["slowest"] > report.slowest:
                report.slowest, report.slowest_number = told["slowest"], told["slowest_number"]
        worker.close()
    if report.slowest > SECONDS:
        report.faults.append({"number": report.slowest_number, "what": f"took {report.slowest:.1f} s of CPU time"})
    if report.lasting > LASTING or report.peak > PEAK:
        grown = f"memory grew by {report.lasting >> 20} MB, and by {report.peak >> 20} MB at its peak"
        report.faults.append({"number": -1, "what": grown})
    report.seconds = time.monotonic() - begun
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=100_000)
    parser.add_argument("--decoders", default=",".join(DECODERS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="time for each decoder at most")
    parser.add_argument("--out", type=Path, help="file for the reports as JSON lines")
    parser.add_argument("--show", type=int, help="write this mutant of the one decoder to stdout")
    args = parser.parse_args()
    names = args.decoders.split(",")
    if args.show is not None:
        decoder = DECODERS[names[0]]
        sys.stdout.buffer.write(mutant(decoder.files(), args.seed, args.show, decoder.repair))
        return 0
    failed = False
    for name in names:
        report = fuzz(name, args.mutants, args.seed, args.seconds)
        common = ", ".join(f"{count} {outcome}" for outcome, count in report.outcomes.most_common(12))
        print(
            f"{name}: {report.mutants} mutants in {report.seconds:.0f} s, {len(report.faults)} faults, slowest "
            f"{report.slowest:.2f} s (number {report.slowest_number}), memory +{report.lasting >> 20} MB, "
            f"peak +{report.peak >> 20} MB; {common}",
            flush=True,
        )
        for fault in report.faults[:20]:
            print(f"  seed {report.seed}, number {fault['number']}: {fault['what']}", flush=True)
        if args.out is not None:
            with open(args.out, "a") as file:
                file.write(json.dumps(vars(report)) + "\n")
        failed |= bool(report.faults)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
