"""`mmgpt bench goodput`: the share of a large run's time that goes to steps that count, failures simulated one by one.

Every number that goes in is an argument whose help says where it is from; those called "assumed" are nobody's figure.
"""

import dataclasses
import heapq
import math
import random
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from mmgpt.core.config import ConfigError
from mmgpt.core.log import check_writable, progress, show, table, write_json

DAY = 86400.0
LLAMA_HOST_DAYS = 54 * 2048 / 419
"""Days of a host between unexpected interruptions: 419 in 54 days of 16,384 GPUs, 8 a host (Llama 3, 2407.21783)."""
LLAMA_PLANNED_HOST_DAYS = 54 * 2048 / 47
"""The same of planned ones: 466 - 419."""
OPT_HOST_DAYS = 60 * 124 / 105
"""OPT-175B: 35 manual and 70 automatic restarts in two months on 124 hosts (arXiv 2205.01068)."""


@dataclasses.dataclass(frozen=True)
class Goodput:
    """A run and its machines. Times are seconds, those with `host_days` days of one host.

    Args:
        hosts: machines, any one of which stops all.
        days: of the machines' time.
        step: seconds of a step; 16 million tokens of a 70B model at half the peak of 4,000 v5p take 7.3.
        save_every: steps between checkpoints that all hosts see.
        local_every: steps between those on each host; 0 for none.
        save_blocks: a save holds the steps up until the arrays are on the host: 0.84 GB of a 70B state a host, at 32
            GB/s (Orbax documentation), are 0.03; doubled.
        save_rest: until a save is whole, beside the steps: 62.5 for 70B (Orbax documentation).
        local_rest: the same on each host, assumed.
        host_days: between unexpected failures; Llama 3's.
        planned_host_days: between planned stops, after a notice that leaves time to save; Llama 3's.
        host_gone: share of failures after which the host is another one, whose local checkpoints are gone: 78 % of
            Llama 3's were of hardware.
        detect: until the others know that one is lost: a heartbeat of 30 and 3 seconds.
        replace: until the scheduler has put another host in its place: a spare that waits, assumed.
        start: of the processes until they have joined and built the model, assumed.
        compile: of the step; the goal of the project, 10 from the compilation cache.
        restore: of a checkpoint that all see: 41.2 for 70B (Orbax documentation).
        local_restore: of one on each host, assumed.
        replay_every: steps between those that are done twice.
        corruption_days: between silent errors of the whole run: every week or two (Gemini, arXiv 2312.11805).
        spike_days: between loss spikes: about 20 in PaLM's two months (arXiv 2204.02311).
        spike_back: steps that a rollback goes back, before the checkpoint it then takes.
        evaluation: share of the time that evaluation and samples take, assumed.
        data_wait: share of the time that the steps wait for data, assumed.
    """

    hosts: int = 1000
    days: float = 54.0
    step: float = 7.3
    save_every: int = 20
    local_every: int = 5
    save_blocks: float = 0.06
    save_rest: float = 62.5
    local_rest: float = 5.0
    host_days: float = LLAMA_HOST_DAYS
    planned_host_days: float = LLAMA_PLANNED_HOST_DAYS
    host_gone: float = 0.78
    detect: float = 33.0
    replace: float = 60.0
    start: float = 30.0
    compile: float = 60.0
    restore: float = 41.2
    local_restore: float = 5.0
    replay_every: int = 500
    corruption_days: float = 10.0
    spike_days: float = 3.0
    spike_back: int = 110
    evaluation: float = 0.002
    data_wait: float = 0.001

    def check(self) -> None:
        """ConfigError on what no run is."""
        above = ("hosts", "days", "step", "save_every", "host_days", "planned_host_days", "replay_every")
        above += ("corruption_days", "spike_days")
        for name, value in vars(self).items():
            if not 0 <= value < math.inf:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}; give a number of 0 or more.")
            if name in above and value == 0:
                raise ConfigError(f"--{name.replace('_', '-')} must be above 0.")
        for name in ("host_gone", "evaluation", "data_wait"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is a share: 0 up to 1.")


KINDS = ("steps", "data", "evaluate", "save", "replay", "lost steps", "restart")


class Simulation:
    """One run, from event to event: failures, planned stops, silent errors and spikes, each with its own chance."""

    def __init__(self, run: Goodput, seed: int) -> None:
        self._run, self._chance = run, random.Random(seed)
        self.seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0)
        self._now = self._done = 0.0
        """Seconds since the beginning, and the steps that count."""
        days = {
            self._fail: run.host_days / run.hosts,
            self._stop: run.planned_host_days / run.hosts,
            self._corrupt: run.corruption_days,
            self._spike: run.spike_days,
        }
        self._next = [(self._after(mean), number, mean, what) for number, (what, mean) in enumerate(days.items())]
        heapq.heapify(self._next)
        saves = run.save_blocks / run.save_every + (run.save_blocks / run.local_every if run.local_every else 0.0)
        cost = {"save": saves, "replay": run.step / run.replay_every}
        whole = (run.step + sum(cost.values())) / (1 - run.evaluation - run.data_wait)
        cost |= {"evaluate": run.evaluation * whole, "data": run.data_wait * whole, "steps": run.step}
        self._cost = cost
        """Seconds of each kind that a step takes, with its part of what is done now and then."""
        self._step = whole

    def run(self) -> dict[str, float]:
        """Shares of the time by kind; "steps" is the goodput."""
        end = self._run.days * DAY
        self._spend("restart", self._run.start + self._run.compile)
        while self._now < end:
            at, number, mean, what = heapq.heappop(self._next)
            if at >= self._now:
                self._work(min(at, end) - self._now)
                if at < end:
                    what()
            # What falls into a restart is no event of its own: `_until_up` has failures there, and no step is taken.
            heapq.heappush(self._next, (self._now + self._after(mean), number, mean, what))
        return {kind: seconds / self._now for kind, seconds in self.seconds.items()}

    def _after(self, mean_days: float) -> float:
        return self._chance.expovariate(1 / (mean_days * DAY))

    def _spend(self, kind: str, seconds: float) -> None:
        self.seconds[kind] += seconds
        self._now += seconds

    def _work(self, seconds: float) -> None:
        """Steps until then; none where a restart is not over yet."""
        if seconds <= 0:
            return
        steps = seconds / self._step
        self._done += steps
        for kind, cost in self._cost.items():
            self._spend(kind, steps * cost)

    def _back_to(self, steps: float) -> None:
        """What was done since is lost, with all that it took."""
        lost = max(0.0, self._done - steps)
        for kind, cost in self._cost.items():
            self.seconds[kind] -= lost * cost
        self.seconds["lost steps"] += lost * self._step
        self._done -= lost

    def _newest(self, done: float, every: int, rest: float) -> float:
        """The newest checkpoint that was whole when so many steps were done."""
        return max(0.0, (done - rest / self._step) // every * every)

    def _restart(self, gone: bool, before: float) -> None:
        run = self._run
        shared = self._newest(self._done, run.save_every, run.save_rest)
        local = self._newest(self._done, run.local_every, run.local_rest) if run.local_every and not gone else -1.0
        self._back_to(max(shared, local))
        load = run.local_restore if local >= shared else run.restore
        self._until_up(before + run.start + run.compile + load)

    def _until_up(self, seconds: float) -> None:
        """A restart, which fails as often as anything else does and then begins again."""
        run = self._run
        rate = run.hosts / (run.host_days * DAY)
        while (up := self._chance.expovariate(rate)) < seconds:
            self._spend("restart", up + run.detect + run.replace)
        self._spend("restart", seconds)

    def _fail(self) -> None:
        gone = self._chance.random() < self._run.host_gone
        self._restart(gone, self._run.detect + (self._run.replace if gone else 0.0))

    def _stop(self) -> None:
        run = self._run  # saved before: no step is lost
        self._until_up(run.save_rest + run.replace + run.start + run.compile + run.restore)

    def _corrupt(self) -> None:
        """Noticed at the next replay, after which the run goes on from its newest checkpoint on another host."""
        run = self._run
        self._work((run.replay_every - self._done % run.replay_every) * self._step)
        self._restart(True, run.replace)

    def _spike(self) -> None:
        """The processes live: they load a checkpoint from before, and plan their rows anew."""
        self._back_to(self._newest(self._done - self._run.spike_back, self._run.save_every, 0.0))
        self._spend("restart", self._run.restore)


def variants(run: Goodput) -> dict[str, Goodput]:
    """The run, and the same with one thing changed: what the figure depends on."""
    replace = dataclasses.replace
    wait = sum((run.detect, run.replace, run.start, run.compile, run.restore))
    changed: dict[str, Goodput] = {"as asked": run}
    for every in (10, 40, 80, 160):
        changed[f"saved every {every * run.step / 60:.1f} min"] = replace(run, save_every=every)
    changed["saved as often as a run does by default"] = replace(run, save_every=250, local_every=0)
    changed["no local checkpoints"] = replace(run, local_every=0)
    for factor in (0.5, 2.0, 4.0, 8.0):
        names = ("detect", "replace", "start", "compile", "restore")
        slower: dict[str, Any] = {name: getattr(run, name) * factor for name in names}
        changed[f"restarts of {wait * factor:.0f} s, not {wait:.0f}"] = replace(run, **slower)
    for factor in (2, 4, 10):
        changed[f"{run.hosts * factor} hosts"] = replace(run, hosts=run.hosts * factor)
    changed["failures as often as OPT-175B's"] = replace(run, host_days=OPT_HOST_DAYS)
    changed["every failure takes the host"] = replace(run, host_gone=1.0)
    return changed


DEFAULT = Goodput()


def bench_goodput(
    run: Annotated[Goodput, tyro.conf.arg(name="")] = DEFAULT, seeds: int = 20, json: Path | None = None
) -> None:
    """Simulates a run over thousands of chips with published failure rates, and what its goodput depends on.

    Args:
        run: the run and its machines.
        seeds: simulated runs for each row; figures are means, and `worst` is the lowest goodput of them.
        json: write the figures.
    """
    run.check()
    if seeds < 1:
        raise ConfigError(f"--seeds is {seeds}; give at least 1.")
    check_writable(json)
    rows: dict[str, dict[str, float]] = {}
    for name, changed in progress(variants(run).items(), total=len(variants(run)), label="variants"):
        found = [Simulation(changed, seed).run() for seed in range(seeds)]
        mean = {kind: float(np.mean([shares[kind] for shares in found])) for kind in KINDS}
        figures = {"goodput": mean.pop("steps"), "worst": min(shares["steps"] for shares in found)} | mean
        rows[name] = {kind: round(100 * share, 2) for kind, share in figures.items()}
    show(table(f"% of the time of {run.hosts} hosts over {run.days:g} days, {seeds} seeds", dict(rows)))
    if json is not None:
        write_json(json, {"run": dataclasses.asdict(run), "seeds": seeds, "percent": rows})
