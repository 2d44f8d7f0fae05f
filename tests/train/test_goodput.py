"""Every second of a run is of one kind, over all its lives."""

import itertools
from pathlib import Path

import pytest

from mmgpt.core.log import Metrics
from mmgpt.train import goodput
from mmgpt.train.goodput import KINDS, LINE, Clock, Rates, spent


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set."""
    time = [100.0]
    monkeypatch.setattr(goodput.time, "perf_counter", lambda: time[0])
    monkeypatch.setattr(goodput.time, "time", lambda: time[0])
    return time


def lived(clock: Clock, now: list[float], **seconds: float) -> None:
    for kind, length in seconds.items():
        clock.to(kind)
        now[0] += length
    clock.to("steps")


def test_every_second_is_of_one_kind(now: list[float]) -> None:
    clock = Clock()
    now[0] += 3
    lived(clock, now, compile=2, data=1, steps=10, save=4)
    seconds = clock.seconds()
    assert seconds == dict.fromkeys(KINDS, 0.0) | {"start": 3, "compile": 2, "data": 1, "steps": 10, "save": 4}
    assert clock.figures()["goodput"] == 0.5 and sum(seconds.values()) == now[0] - 100


def test_rates_are_of_the_steps_alone(now: list[float]) -> None:
    clock = Clock()
    rates = Rates(clock)
    lived(clock, now, data=1, steps=3, evaluate=50)
    assert rates.read(4) == (4, 4.0, 1.0)
    lived(clock, now, steps=2)
    assert rates.read(5) == (1, 2.0, 0.0)


def told(folder: Path, clock: Clock, step: int) -> None:
    metrics = Metrics(folder)
    metrics.write(step, clock.figures(), LINE)
    metrics.write(step, {"loss": 1.0})
    metrics.close()


def test_what_a_killed_life_did_after_its_checkpoint_is_lost(now: list[float], tmp_path: Path) -> None:
    path, clock = tmp_path / "metrics.jsonl", Clock()
    assert spent(path, False) == 0.0
    lived(clock, now, compile=5, steps=10)
    kept = clock.seconds()  # the checkpoint
    lived(clock, now, steps=7)
    told(tmp_path, clock, 17)
    now[0] += 30  # some steps that nothing tells of, the kill, the queue
    again = Clock()
    now[0] += 2
    again.begin(kept, spent(path, False) - 2)
    seconds = again.seconds()
    assert seconds["lost"] == 37 and seconds["steps"] == 10 and seconds["start"] == 2
    assert sum(seconds.values()) == now[0] - 100


def test_a_run_that_had_ended_has_not_lost_the_time_since(now: list[float], tmp_path: Path) -> None:
    clock = Clock()
    lived(clock, now, steps=10)
    told(tmp_path, clock, 10)
    now[0] += 1e6
    assert spent(tmp_path / "metrics.jsonl", True) == 10


def test_what_was_done_after_the_checkpoint_that_a_rollback_goes_to_is_lost(now: list[float]) -> None:
    clock = Clock()
    lived(clock, now, compile=5, steps=10)
    kept = clock.seconds()
    for _ in range(2):
        lived(clock, now, steps=8, data=1)
        clock.go_back(kept)
    assert clock.seconds() == dict.fromkeys(KINDS, 0.0) | {"compile": 5, "steps": 10, "lost": 18}


def test_the_last_line_that_can_be_read_counts(now: list[float], tmp_path: Path) -> None:
    path, clock = tmp_path / "metrics.jsonl", Clock()
    lived(clock, now, steps=10)
    told(tmp_path, clock, 1)
    whole = path.read_bytes()
    for cut in itertools.chain(range(1, 60), [len(whole) // 2]):
        path.write_bytes(whole + whole[:cut] + b"\x00\xff\n{}\n[1]\n" + whole[:cut])
        assert spent(path, False) == 10
    path.write_bytes(b"no line\n")
    assert spent(path, False) == 0
