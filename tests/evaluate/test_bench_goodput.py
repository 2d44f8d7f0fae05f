"""The simulation of failures against what can be reckoned by hand."""

import dataclasses

import pytest

from mmgpt.core.config import ConfigError
from mmgpt.evaluate.bench_goodput import KINDS, Goodput, Simulation, variants

NEVER = 1e12
QUIET = Goodput(host_days=NEVER, planned_host_days=NEVER, corruption_days=NEVER, spike_days=NEVER)


def mean(run: Goodput, seeds: int = 30) -> dict[str, float]:
    found = [Simulation(run, seed).run() for seed in range(seeds)]
    assert all(sum(shares.values()) == pytest.approx(1.0) for shares in found)
    return {kind: sum(shares[kind] for shares in found) / seeds for kind in KINDS}


def test_without_failures_a_step_has_its_share_of_what_is_done_now_and_then() -> None:
    found = mean(QUIET, 1)
    extra = QUIET.save_blocks * (1 / QUIET.save_every + 1 / QUIET.local_every) + QUIET.step / QUIET.replay_every
    expected = (1 - QUIET.evaluation - QUIET.data_wait) * QUIET.step / (QUIET.step + extra)
    assert found["steps"] == pytest.approx(expected, rel=1e-4) and found["lost steps"] == 0
    assert found["evaluate"] == pytest.approx(QUIET.evaluation, rel=1e-3)


def test_failures_cost_a_restart_and_half_an_interval() -> None:
    run = dataclasses.replace(QUIET, host_days=200.0, host_gone=1.0, local_every=0, save_rest=0.0)
    found, every = mean(run), run.host_days / run.hosts * 86400
    restart = run.detect + run.replace + run.start + run.compile + run.restore
    interval = run.save_every * run.step
    assert found["restart"] == pytest.approx(restart / (every + restart), rel=0.05)
    assert found["lost steps"] == pytest.approx(interval / 2 / (every + restart), rel=0.1)
    later = mean(dataclasses.replace(run, save_rest=60.0))
    assert later["lost steps"] - found["lost steps"] == pytest.approx(60.0 / (every + restart), rel=0.2)


def test_planned_stops_lose_no_step_and_local_checkpoints_save_some() -> None:
    assert mean(dataclasses.replace(QUIET, planned_host_days=200.0), 3)["lost steps"] == 0
    kept = dataclasses.replace(QUIET, host_days=200.0, host_gone=0.0)
    lost = [mean(run)["lost steps"] for run in (kept, dataclasses.replace(kept, local_every=0))]
    assert lost[0] < lost[1] / 2


def test_a_spike_goes_back_further_than_a_checkpoint() -> None:
    run = dataclasses.replace(QUIET, spike_days=1.0)
    found = mean(run, 10)
    steps = found["lost steps"] * run.days * 86400 / (run.days / run.spike_days) / run.step
    assert run.spike_back < steps < run.spike_back + run.save_every


def test_the_same_seed_is_the_same_run_and_more_hosts_do_worse() -> None:
    assert Simulation(Goodput(), 3).run() == Simulation(Goodput(), 3).run() != Simulation(Goodput(), 4).run()
    found = [mean(dataclasses.replace(Goodput(), hosts=hosts), 5)["steps"] for hosts in (100, 1000, 10_000)]
    assert found == sorted(found, reverse=True)


def test_a_thousand_hosts_reach_97_percent_and_every_variant_is_another_run() -> None:
    assert mean(Goodput())["steps"] >= 0.97
    runs = list(variants(Goodput()).values())
    assert len(set(runs)) == len(runs)


@pytest.mark.parametrize(
    "change",
    [
        {"hosts": 0},
        {"host_gone": 1.5},
        {"spike_days": 0.0},
        {"save_every": -1},
        {"days": float("nan")},
        {"days": float("inf")},
        {"restore": -1.0},
    ],
)
def test_numbers_that_make_no_run_are_told(change: dict) -> None:
    with pytest.raises(ConfigError, match=f"--{next(iter(change)).replace('_', '-')}"):
        dataclasses.replace(Goodput(), **change).check()
