"""Kills a training run again and again; each must end as an undisturbed one, bit for bit.

    python -m tests.soak.kills --times 100 --seed 1 --processes mixed

A run is killed ten times with -9: by turns while it starts, compiles, trains and saves. Of two processes one is killed,
or stopped as a machine that hangs, and the other must end with 75 within the heartbeat and three seconds. Then the run
may end: all arrays of its last checkpoint, the losses of all steps and all held-out figures must be those of the
undisturbed run. With `mixed` each start is of one or two processes, over the same two devices.
"""

import argparse
import random
import signal
import tempfile
import time
from pathlib import Path

from mmgpt.train.run import Run
from tests.soak.lives import HEARTBEAT, Life, as_undisturbed, begun, finish, is_saving, life, run_of, saved

MOMENTS = ("start", "step", "save", "compile", "step", "save", "step", "save")
EACH = 10
"""Kills of one run before it may end."""
GRACE = 3.0
STEPS = 40


def at(moment: str, alive: Life, chance: random.Random) -> bool:
    """Waits for a moment of a life; False if the run has ended before it."""
    folder = alive.folder
    if moment == "start":
        end = time.monotonic() + chance.uniform(0, 4)
        return alive.until(lambda: time.monotonic() > end)
    if moment == "compile":
        reached = alive.until(lambda: "Compiling jit(step)" in alive.said())
        time.sleep(chance.uniform(0, 1.0))
        return reached
    first = saved(folder)
    if moment == "save":
        reached = alive.until(lambda: alive.told() > first and is_saving(folder))
        time.sleep(chance.uniform(0, 0.03))
        return reached
    reached = alive.until(lambda: saved(folder) > first)  # a life that gets somewhere
    step = alive.told() + chance.randrange(3)
    return reached and alive.until(lambda: alive.told() >= step)


def kill(alive: Life, chance: random.Random) -> str:
    """Kills a life: of two processes one, whose loss the other must notice. What was done."""
    if len(alive.processes) == 1:
        alive.send(signal.SIGKILL)
        alive.ended()
        return "killed"
    victim, how = chance.randrange(2), chance.choice([signal.SIGKILL, signal.SIGSTOP])
    joined = "Gloo" in alive.said()
    alive.send(how, victim)
    begin = time.monotonic()
    code = alive.processes[1 - victim].wait(60 if joined else 400)
    seconds = time.monotonic() - begin
    alive.send(signal.SIGKILL, victim)
    if joined:
        said = f"process {victim} of 2 was lost"
        assert code == 75 and said in alive.said(), f"code {code}\n{alive.said()[-3000:]}"
        assert seconds <= HEARTBEAT + GRACE, f"the other one ended after {seconds:.1f} s"
    return f"{'lead' if victim == 0 else 'other'} {how.name}, the survivor ended with {code} after {seconds:.1f} s"


def one_run(run: Run, folder: Path, undisturbed: Path, kills: int, processes: str, chance: random.Random) -> list[str]:
    """Kills a run so many times, lets it end and compares it; a line for each kill."""
    begun(run, folder)
    done: list[str] = []
    for turn in range(10 * kills):
        moment = MOMENTS[turn % len(MOMENTS)]
        count = chance.randrange(1, 3) if processes == "mixed" else int(processes)
        compiles = {"JAX_LOG_COMPILES": "1"} if moment == "compile" else {}
        with life(folder, count, cached=moment != "compile", **compiles) as alive:
            if not at(moment, alive, chance):
                assert set(alive.ended()) == {0}, alive.said()[-3000:]
                break
            how = kill(alive, chance)
        inside = " in a save" if is_saving(folder) else ""
        done.append(f"{moment}{inside}, {count} process(es): {how}; saved {saved(folder)}")
        print(done[-1], flush=True)
        if len(done) == kills:
            break
    finish(folder, 1 if processes == "1" else 2)
    as_undisturbed(undisturbed, folder, run)
    return done


def soak(times: int, seed: int, processes: str, folder: Path, steps: int = STEPS) -> list[str]:
    """At least `times` kills; a line for each. AssertionError where a run does not end as it should."""
    chance = random.Random(seed)
    run = run_of(folder / "data", steps)
    undisturbed = begun(run, folder / "undisturbed")
    finish(undisturbed, 1 if processes == "1" else 2)
    found: list[str] = []
    runs = 0
    while len(found) < times:
        runs += 1
        begin = time.monotonic()
        name = folder / f"run-{runs}"
        new = one_run(run, name, undisturbed, min(EACH, times - len(found)), processes, chance)
        found += new
        print(f"{name.name}: {len(new)} kills, ended as undisturbed, {time.monotonic() - begin:.0f} s", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", choices=["1", "2", "mixed"], default="1")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kills-", dir="/var/tmp") as folder:
        found = soak(args.times, args.seed, args.processes, Path(folder))
    inside = sum("in a save" in line for line in found)
    print(
        f"{len(found)}/{args.times} kills, {inside} inside a save: every run ended bit for bit as the undisturbed one"
    )


if __name__ == "__main__":
    main()
