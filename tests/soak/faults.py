"""Two hundred mixed faults of one run, which must end as if there had been none: `python -m tests.soak.faults`.

    python -m tests.soak.faults --faults 200 --seed 1

A small run is killed, stopped, given damaged checkpoints and metrics, a full disk, data that cannot be read for a
while, batches whose gradients are no numbers, losses that spike, and steps that come out wrong in silence. In the end
all its arrays, and the losses of all steps that its metrics tell of, must be those of a run that met none of it, on the
same data and with the same rows left out.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mmgpt.core.log import console, progress
from mmgpt.train import replay, skips
from mmgpt.train.run import Run
from mmgpt.train.spikes import Spikes
from tests import tiny
from tests.small_disk import small_disk
from tests.train.test_loop import ROOT, arrays, prepared

ROWS = 8
PATIENCE = 300.0
PAUSE = 0.04
"""Seconds of a step, so that a life does not outrun the faults."""
DISK = "96m"


@dataclasses.dataclass
class Poison:
    """Batches that harm: single ones without finite gradients, and three in a row of either kind, which are a spike."""

    single: list[int]
    triples: list[int]
    high: list[int]

    def rows(self) -> dict[str, list[int]]:
        """The first rows of the batches, by kind."""
        nan = [*self.single, *(first + i for first in self.triples for i in range(3))]
        return {
            "nan": [ROWS * batch for batch in nan],
            "spike": [ROWS * (first + i) for first in self.high for i in range(3)],
        }


def poisoned(steps: int, count: int, chance: random.Random) -> Poison:
    """`count` poisons, far enough from each other that each is met, of each kind as many."""
    places = list(range(90, steps - 30, 15))
    chosen = sorted(chance.sample(places, min(count, len(places))))
    found = Poison([], [], [])
    for number, place in enumerate(chosen):
        (found.single, found.triples, found.high)[number % 3].append(place)
    return found


class World:
    """One run that is disturbed, and what was done to it."""

    def __init__(self, folder: Path, disk: Path, faults: int, seed: int) -> None:
        self.chance = random.Random(seed)
        self.done: collections.Counter[str] = collections.Counter()
        self.faults = faults
        (folder / "data").mkdir(parents=True)
        steps = max(200, 8 * faults)
        self.poison = poisoned(steps, 2 * faults // 5, self.chance)
        run = tiny.run(folder / "data", steps=steps, log_every=5, evaluate_every=200, save_every=10, replay_every=10)
        self.run: Run = run.replace(
            spikes=Spikes.Config(in_a_row=3, skip=4, rollbacks=10 * faults),
            checkpoint=run.checkpoint.replace(keep=6),
            data=run.data.replace(cache_bytes=0, prefetch=2),  # every batch comes from the file, as it is then
        )
        self.outside = folder
        self.disk = disk
        self.folder = prepared(self.run, disk / "run")
        self.process: subprocess.Popen[bytes] | None = None

    # --- the run

    def start(self, folder: Path, wrong: int = 0, pause: float = PAUSE) -> subprocess.Popen[bytes]:
        told = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
        told |= {"JAX_COMPILATION_CACHE_DIR": str(self.outside / "compiled"), "PYTHONUNBUFFERED": "1"}
        told["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
        faults = json.dumps(self.poison.rows() | {"wrong": wrong, "pause": pause})
        with open(self.outside / "log", "wb") as log:  # of this life alone
            command = [sys.executable, "-m", "tests.soak.trainer", faults, str(folder)]
            self.process = subprocess.Popen(command, cwd=ROOT, env=told, stdout=log, stderr=log)
        return self.process

    def said(self) -> str:
        """What this life has told last."""
        return (self.outside / "log").read_text(errors="replace")[-6000:]

    def told(self) -> int:
        """The last step that this life told of; 0 before the first."""
        return int(([0, *re.findall(r"^step (\d+)/", self.said(), re.MULTILINE)])[-1])

    def until(self, reached: Callable[[], bool]) -> bool:
        """Waits; False where the process ended before."""
        end = time.monotonic() + PATIENCE
        assert self.process is not None
        while self.process.poll() is None:
            if reached():
                return True
            assert time.monotonic() < end, f"nothing happens\n{self.said()}"
            time.sleep(0.01)
        return False

    def ended(self, *codes: int) -> int:
        assert self.process is not None
        code = self.process.wait(PATIENCE)
        assert code in codes, f"exit code {code}, expected {codes}\n{self.said()}"
        return code

    # --- what is done to it

    def life(self) -> bool:
        """One start, with what is done before, within and at the end of it; False where the run has ended."""
        chance = self.chance
        for fault in (self.damaged_step, self.damaged_metrics):
            if chance.random() < 0.7:
                fault()
        wrong = chance.randrange(3, 8) if chance.random() < 0.2 else 0
        self.start(self.folder, wrong)
        alive = self.until(lambda: self.told() > 0)
        for fault in chance.choices([self.unreadable_data, self.full_disk], [3, 1], k=chance.randrange(3, 8)):
            if alive:
                fault()
                alive = self.moves()
        assert self.process is not None
        if wrong or not alive:
            return self.ended_itself()
        if chance.random() < 0.5:
            self.process.send_signal(signal.SIGTERM)
            if self.ended(0, 75) == 0:
                return False
            self.done["SIGTERM"] += 1
        else:
            self.process.kill()
            self.ended(0, -signal.SIGKILL)
            self.done["kill -9"] += 1
        return True

    def moves(self) -> bool:
        """Waits until the run tells of another step, be it one before after a rollback; False if it ended."""
        step = self.told()
        return self.until(lambda: self.told() != step)

    def ended_itself(self) -> bool:
        """With a step that came out wrong, a write that a full disk refused, or (False) all done."""
        code = self.ended(0, 1, 75)
        if code == 75:
            assert "gave other bits" in self.said(), self.said()
            self.done["silent corruption"] += 1
        elif code == 1:
            assert "the disk is full" in self.said() or "No space left" in self.said(), self.said()
        return code != 0

    def saved(self) -> list[int]:
        found = (self.folder / "checkpoints").glob("*")
        return sorted(int(path.name) for path in found if path.name.isdecimal())

    def damaged_step(self) -> None:
        """A bit flipped in some file of the newest checkpoint, or a part cut off, or the file gone."""
        saved = self.saved()
        if len(saved) < 4:  # so that there is always one to go back to
            return
        files = [path for path in (self.folder / "checkpoints" / str(saved[-1])).rglob("*") if path.is_file()]
        file = self.chance.choice(sorted(files))
        size = file.stat().st_size
        how = self.chance.choice(["flipped", "cut", "gone"])
        if how == "gone" or not size:
            file.unlink()
        elif how == "cut":
            os.truncate(file, self.chance.randrange(size))
        else:
            data = bytearray(file.read_bytes())
            data[self.chance.randrange(size)] ^= 1 << self.chance.randrange(8)
            file.write_bytes(data)
        self.done[f"checkpoint {how}"] += 1

    def damaged_metrics(self) -> None:
        """The end of the metrics cut off, or followed by what is no line."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return
        data = path.read_bytes()
        tails = (b"\x00" * 100, b'{"step": 1, "kind"', b"\xff\xfe\n[]\nnull\n", b'{"step": "x", "kind": "train"}\n')
        if self.chance.random() < 0.5:
            data = data[: -self.chance.randrange(1, 200)]
        path.write_bytes(data + self.chance.choice(tails))
        self.done["metrics damaged"] += 1

    def unreadable_data(self) -> None:
        """A file of the data is cut off and whole again, as when a network share comes and goes."""
        path = self.chance.choice(sorted((self.outside / "data").rglob("*.array_record")))
        data = path.read_bytes()
        os.truncate(path, self.chance.randrange(len(data)))
        time.sleep(self.chance.uniform(0.1, 0.6))
        path.write_bytes(data)
        self.done["data unreadable"] += 1

    def full_disk(self) -> None:
        """No byte is left on the run's disk, for long enough that a save meets it."""
        filler = self.disk / "filler"
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        time.sleep(self.chance.uniform(0.4, 0.8))
        filler.unlink()
        self.done["disk full"] += 1

    # --- the end

    def soak(self) -> dict[str, Any]:
        """All faults, the end of the run, and the comparison with one that met none."""
        inside = len(self.poison.single) + len(self.poison.triples) + len(self.poison.high)
        for _ in progress(self._lives(self.faults - inside), label="lives"):
            pass
        while self.start(self.folder, pause=0.0).wait(4 * PATIENCE) != 0:
            raise AssertionError(f"the run does not end\n{self.said()}")
        self.done["gradients not finite"] += len(self.poison.single)
        found = skips.Skips.load(self.folder, ROWS).found
        for first in [*self.poison.triples, *self.poison.high]:
            rows = ROWS * first, ROWS * (first + 3)
            assert any(s.first_row <= rows[0] and rows[1] <= s.stop_row for s in found), f"batch {first} was trained on"
            self.done["loss spike" if first in self.poison.high else "three not finite"] += 1
        record = self.folder / replay.NAME
        lines = record.read_text().splitlines() if record.exists() else []
        assert len(lines) == self.done["silent corruption"]
        reference = prepared(self.run, self.outside / "reference")
        shutil.copy(self.folder / skips.NAME, reference)
        assert self.start(reference, pause=0.0).wait(4 * PATIENCE) == 0, self.said()
        self.compare(reference)
        goodput = [line for line in metrics(self.folder) if line["kind"] == "goodput"][-1]
        return {"faults": sum(self.done.values()), "by kind": dict(self.done), "goodput": goodput}

    def _lives(self, faults: int) -> Iterator[int]:
        while sum(self.done.values()) < faults:
            assert self.life(), f"the run ended after {sum(self.done.values())} faults; give it more steps"
            yield sum(self.done.values())

    def compare(self, reference: Path) -> None:
        one, other = arrays(reference, self.run), arrays(self.folder, self.run)
        differ = [name for name in one if not np.array_equal(one[name], other[name])]
        assert one.keys() == other.keys() and not differ, f"other bits in {differ}"
        kept = [{m["step"]: m["loss"] for m in metrics(f) if m["kind"] == "train"} for f in (reference, self.folder)]
        # A full disk and cut metrics may have cost lines of theirs.
        assert len(kept[1]) > 0.8 * len(kept[0])
        wrong = [step for step, loss in kept[1].items() if kept[0][step] != loss and loss == loss]
        assert not wrong, f"other losses at steps {wrong}"


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics that can be read."""
    path, found = folder / "metrics.jsonl", []
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            found += [record] if isinstance(record["step"], int) else []
    return found


def soak(faults: int, seed: int, folder: Path) -> dict[str, Any]:
    """Runs all; AssertionError where something does not end as it should."""
    with small_disk(folder / "disk", DISK) as disk:
        world = World(folder / "world", disk, faults, seed)
        try:
            return world.soak()
        finally:
            if world.process is not None and world.process.poll() is None:
                world.process.kill()
                world.process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        told = soak(asked.faults, asked.seed, Path(folder))
    console.print(json.dumps(told, indent=2))
    console.print(
        f"{told['faults']}/{asked.faults} faults, bit for bit as undisturbed; {time.monotonic() - begin:.0f} s"
    )
    return 0 if told["faults"] >= asked.faults else 1


if __name__ == "__main__":
    sys.exit(main())
