"""Sends SIGTERM to a training run in all that it does; it must save, exit with 75 and go on exactly.

    python -m tests.soak.preemptions --times 24

The moments are a step, the first compile, an evaluation, a save, the start, and a wait for data that do not come (the
loaders were stopped during an evaluation, when they had filled what they may), by turns in one process and in two, of
which one or both get the signal.
The last step that was done must be saved, and the run then end as an undisturbed one. How long it took is told, and how
often that was within two seconds and a step.
"""

import argparse
import itertools
import os
import random
import signal
import tempfile
import time
from pathlib import Path

from mmgpt.core.log import read_metrics
from mmgpt.train.run import Run
from tests.soak.lives import Life, as_undisturbed, begun, finish, is_saving, life, run_of, saved

MOMENTS = ("step", "compile", "evaluation", "data", "save", "start")
SECONDS = 2.0
STEPS = 40
EVALUATE_EVERY = 4
LATE = "late"
STILL = 1.5
"""Seconds without a step after which a run waits for data."""


def runs(folder: Path, steps: int) -> dict[str, Run]:
    """By moment the run in which it is met: with long evaluations, or with a loader in a process of its own."""
    run = run_of(folder, steps)
    evaluated = run.replace(evaluate_every=EVALUATE_EVERY, held_out_batches=8, save_every=1000)
    starved = evaluated.replace(data=run.data.replace(workers=1, prefetch=2))
    return dict.fromkeys(MOMENTS, run) | {"evaluation": evaluated, "data": starved}


def at(moment: str, alive: Life, chance: random.Random) -> bool:
    """Waits for a moment of a life; False if the run has ended before it."""
    step = chance.randrange(3, 20)
    if moment == "start":
        end = time.monotonic() + chance.uniform(0.2, 3)
        return alive.until(lambda: time.monotonic() > end)
    if moment == "compile":
        reached = alive.until(lambda: "Compiling jit(step)" in alive.said())
        time.sleep(chance.uniform(0, 0.3))
        return reached
    if moment == "save":
        return alive.until(lambda: alive.told() >= 3 and is_saving(alive.folder))
    if moment == "step":
        return alive.until(lambda: alive.told() >= step)
    reached = alive.until(lambda: _evaluates(alive.told(), alive.told("held_out"), step))
    return reached and (moment == "evaluation" or _starved(alive))


def _evaluates(step: int, evaluated: int, since: int) -> bool:
    """Whether an evaluation is due and not yet told; any from a step on, for a busy machine may miss one of them."""
    return step >= since and step - step % EVALUATE_EVERY > evaluated


def _starved(alive: Life) -> bool:
    """Stops the loader's workers, and waits until the run waits for them."""
    workers = alive.children()
    assert workers, alive.said()[-3000:]
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    last, since = alive.told(), time.monotonic()

    def still() -> bool:
        nonlocal last, since
        if alive.told() != last:
            last, since = alive.told(), time.monotonic()
        return time.monotonic() - since > STILL

    return alive.until(still)


def one(moment: str, processes: int, run: Run, folder: Path, undisturbed: Path, chance: random.Random) -> str:
    """Preempts a run once, lets it end and compares it; a line about it. AssertionError where it goes wrong."""
    begun(run, folder)
    first = {} if moment != "compile" else {"JAX_LOG_COMPILES": "1"}
    with life(folder, processes, cached=moment != "compile", **first) as alive:
        reached = at(moment, alive, chance)
        assert reached, f"the run ended before its {moment}\n{alive.said()[-3000:]}"
        to = chance.choice([[*range(processes)], [chance.randrange(processes)]])
        before, begin = alive.told(), time.monotonic()
        alive.send(signal.SIGTERM, *to)
        codes = alive.ended(120)
        seconds = time.monotonic() - begin
        done = alive.told()
        assert set(codes) == {75}, f"{moment}, {processes} process(es): codes {codes}\n{alive.said()[-3000:]}"
    assert saved(folder) == done, f"{moment}, {processes} process(es): step {done} done, {saved(folder)} saved"
    told = read_metrics(folder / "metrics.jsonl") if done else []
    step = max((line["step_seconds"] for line in told if "step_seconds" in line), default=0.0)
    late = f" ({LATE})" if seconds > SECONDS + step else ""
    owed = ", its evaluation owed" if moment == "evaluation" and alive.told("held_out") < done else ""
    finish(folder, processes)
    as_undisturbed(undisturbed, folder, run)
    whom = "both" if len(to) == 2 else f"process {to[0]}"
    return (
        f"{moment}, {processes} process(es), {whom} at step {before}: saved {done}{owed}, {seconds:.2f} s{late}, exact"
    )


def soak(times: int, seed: int, folder: Path, moments: tuple[str, ...] = MOMENTS, steps: int = STEPS) -> list[str]:
    """So many preemptions; a line for each."""
    chance = random.Random(seed)
    by_moment = runs(folder / "data", steps)
    undisturbed: dict[str, Path] = {}
    found = []
    cells = itertools.cycle([(m, n) for m in moments for n in (1, 2)])
    for number, (moment, processes) in enumerate(itertools.islice(cells, times)):
        run = by_moment[moment]
        kind = moment if run is not by_moment["step"] else "plain"
        if kind not in undisturbed:
            undisturbed[kind] = begun(run, folder / f"undisturbed-{kind}")
            finish(undisturbed[kind], 1)
        found.append(one(moment, processes, run, folder / f"run-{number}", undisturbed[kind], chance))
        print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="preemptions-", dir="/var/tmp") as folder:
        found = soak(args.times, args.seed, Path(folder))
    soon = sum(LATE not in line for line in found)
    print(f"{len(found)}/{args.times} saved, exited with 75 and ended as the undisturbed run, {soon} of them in time")


if __name__ == "__main__":
    main()
