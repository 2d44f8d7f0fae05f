"""Whole runs that heal: a spike is left behind and its rows left out, again and again in the same way."""

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mmgpt.core.log import read_metrics
from mmgpt.train import loop, rollback
from mmgpt.train import run as runs
from mmgpt.train.checkpoint import Checkpoints
from mmgpt.train.feed import feed
from mmgpt.train.loop import Outcome, train
from mmgpt.train.replay import NAME as CORRUPTION
from mmgpt.train.replay import Corruption
from mmgpt.train.rollback import SpikeError
from mmgpt.train.run import Run
from mmgpt.train.skips import NAME, Skips
from mmgpt.train.spikes import Spikes
from tests import tiny
from tests.train.poison import make_step
from tests.train.test_loop import ROOT, arrays, lines, prepared

STEPS = 16


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Of 8 rows a step, where three steps in a row that are no numbers are a spike."""
    spikes = Spikes.Config(in_a_row=3, skip=4)
    return tiny.run(tmp_path_factory.mktemp("world"), steps=STEPS, evaluate_every=STEPS, spikes=spikes)


def batches(first: int, stop: int) -> list[int]:
    """Their first rows."""
    return [8 * batch for batch in range(first, stop)]


def trained(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, **poison: Any) -> Outcome:
    monkeypatch.setattr(loop, "make_step", make_step(**poison))
    return train(run, folder)


@pytest.fixture(scope="module")
def healed(made: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Batches 9 to 11 are poisoned: steps 10 to 12 are bad, and batches 7 to 11 left out."""
    folder = tmp_path_factory.mktemp("runs") / "healed"
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert trained(made, folder, monkeypatch, nan=batches(9, 12)) == Outcome(STEPS, False)
    return folder


def same(a: Path, b: Path, run: Run) -> bool:
    """Whether two runs end in the same bits and told the same losses."""
    first, second = arrays(a, run), arrays(b, run)
    told = [{step: line["loss"] for step, line in lines(folder, "train").items()} for folder in (a, b)]
    assert set(told[0]) == set(range(1, run.steps + 1)) and len(first) > 30
    return told[0] == told[1] and all(np.array_equal(first[name], second[name]) for name in first)


def test_a_run_leaves_a_spike_behind_and_says_so(healed: Path, capsys: pytest.CaptureFixture) -> None:
    (skip,) = Skips.load(healed, 8).found
    assert (skip.first_row, skip.stop_row, skip.first_step, skip.last_step) == (56, 96, 10, 12)
    assert skip.why == "gradients that are not finite"
    (told,) = [line for line in read_metrics(healed / "metrics.jsonl") if line["kind"] == "rollback"]
    assert (told["step"], told["rollbacks"], told["first_row"], told["stop_row"]) == (6, 1, 56, 96)
    train = lines(healed, "train")
    assert all(np.isfinite(line["loss"]) and line["skipped"] == 0 for line in train.values())
    aside = [path.name for path in (healed / "checkpoints").iterdir() if "abandoned" in path.name]
    assert sorted(aside) == ["10.abandoned-1", "8.abandoned-1"]  # the third, of step 6, was gone back to


def test_data_that_is_away_as_a_run_goes_back_does_not_end_it(
    made: Run, healed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network share that is gone for a moment: reading waits for it, and nothing is opened again."""
    shards = [path for source in made.data.sources for path in Path(source.path).glob("*.array_record")]
    back = threading.Timer(0.5, lambda: [path.with_suffix(".away").rename(path) for path in shards])

    def go_back(*arguments: Any) -> Skips:
        for path in shards:
            path.rename(path.with_suffix(".away"))
        back.start()
        return rollback.go_back(*arguments)

    monkeypatch.setattr(loop, "go_back", go_back)
    run = made.replace(data=made.data.replace(cache_bytes=0, prefetch=1))
    try:
        assert trained(run, tmp_path / "run", monkeypatch, nan=batches(9, 12)) == Outcome(STEPS, False)
    finally:
        back.join()
    assert same(tmp_path / "run", healed, made)


def test_the_order_of_batches_is_that_of_the_record_for_any_number_of_hosts(made: Run, healed: Path) -> None:
    built, skips = runs.build(made), Skips.load(healed, 8)
    rows = runs.build_rows(built, None, skips)
    expected = [*range(56), *range(96, 8 * (STEPS + 5))]
    for step in (0, 3, 6, 7, 8, STEPS - 1, STEPS):
        for count in (1, 2, 4):
            parts = [[b.row_id for b in feed(rows, skips, step, (part, count))] for part in range(count)]
            whole = [row for batch in zip(*parts, strict=True) for row in np.concatenate(batch).tolist()]
            assert whole == expected[8 * step :], (step, count)


def test_the_same_record_given_to_a_new_run_gives_the_same_bits(
    made: Run, healed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "new").mkdir()
    shutil.copy(healed / NAME, tmp_path / "new")
    trained(made, tmp_path / "new", monkeypatch)
    assert same(tmp_path / "new", healed, made)
    assert not [line for line in read_metrics(tmp_path / "new" / "metrics.jsonl") if line["kind"] == "rollback"]


@pytest.mark.parametrize("step", [6, 12])
def test_a_run_goes_on_from_any_step_after_it_bit_for_bit(
    made: Run, healed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """At step 6 as after a kill between the record and the rollback: what was given up lies there still."""
    folder = tmp_path / "run"
    if step == 12:
        shutil.copytree(healed, folder)
        for later in (14, 16):
            shutil.rmtree(folder / "checkpoints" / str(later))
    else:
        blind = made.replace(steps=12, spikes=made.spikes.replace(in_a_row=99), checkpoint=keeping(10))
        with monkeypatch.context() as patched:
            patched.setattr(loop, "goes_on", lambda run, run_dir: True)
            trained(made.replace(spikes=blind.spikes, checkpoint=blind.checkpoint), folder, patched, nan=batches(9, 30))
        for later in (14, 16):
            shutil.rmtree(folder / "checkpoints" / str(later))
        shutil.copy(healed / NAME, folder)
    trained(made, folder, monkeypatch, nan=batches(9, 12))
    assert same(folder, healed, made)


def keeping(count: int) -> Checkpoints.Config:
    return Checkpoints.Config(keep=count)


def test_a_spike_before_the_first_checkpoint_begins_anew(
    made: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(made.replace(save_every=STEPS), tmp_path / "run", monkeypatch, nan=batches(0, 3))
    (skip,) = Skips.load(tmp_path / "run", 8).found
    assert (skip.first_row, skip.stop_row) == (0, 24)
    assert set(lines(tmp_path / "run", "train")) == set(range(1, STEPS + 1))


@pytest.mark.slow
def test_too_many_rollbacks_end_the_run_with_what_to_do(
    made: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made.replace(spikes=made.spikes.replace(rollbacks=2))
    with pytest.raises(SpikeError, match=r"(?s)not finite\. The run went back 2 times already.*spikes.rollbacks is 2"):
        trained(run, tmp_path / "run", monkeypatch, nan=batches(9, 60))
    assert [skip.first_row for skip in Skips.load(tmp_path / "run", 8).found] == [56, 48]
    trained(made, tmp_path / "run", monkeypatch, nan=batches(9, 20))  # the data was mended, and more are allowed


def test_a_spike_that_every_checkpoint_has_seen_is_told(
    made: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made.replace(log_every=STEPS)
    with pytest.raises(SpikeError, match=r"every checkpoint is from after that: \[10, 12, 14\]"):
        trained(run, tmp_path / "run", monkeypatch, nan=batches(3, 6))


@pytest.mark.slow
def test_a_high_loss_is_left_behind_too(made: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made.replace(steps=100, log_every=10, evaluate_every=100, save_every=10)
    trained(run, tmp_path / "run", monkeypatch, spike=batches(84, 87))
    (skip,) = Skips.load(tmp_path / "run", 8).found
    assert (skip.first_row, skip.stop_row) == (8 * 82, 8 * 90) and "a loss of" in skip.why
    seconds = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "goodput"][-1]
    assert seconds["seconds/lost"] > 0 and 0 < seconds["goodput"] < 1


def test_a_step_that_comes_out_wrong_is_found_and_not_saved(
    made: Run, healed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, run = tmp_path / "run", made.replace(replay_every=5)
    calls = itertools.count()

    def faulty(*built: Any, **settings: Any) -> Any:
        step = make_step(nan=batches(9, 12))(*built, **settings)

        def wrong(state: Any, batch: Any) -> Any:
            state, values = step(state, batch)
            if next(calls) == 5:  # the second time of step 5
                state["params"]["embedding"] = jax.tree.map(lambda x: x + 1e-6, state["params"]["embedding"])
            return state, values

        return wrong

    monkeypatch.setattr(loop, "make_step", faulty)
    with pytest.raises(Corruption, match="step 5 gave other bits"):
        train(run, folder)
    assert sorted(p.name for p in (folder / "checkpoints").glob("[0-9]*")) == ["2", "4"]
    assert json.loads((folder / CORRUPTION).read_text())["step"] == 5
    trained(run, folder, monkeypatch, nan=batches(9, 12))
    assert same(folder, healed, made)


@pytest.mark.slow
@pytest.mark.multiproc
def test_two_processes_go_back_together_and_find_what_one_of_them_computes_wrongly(made: Run, tmp_path: Path) -> None:
    run = made.replace(replay_every=4)
    poison = {"nan": batches(9, 12), "spike": [], "pause": 0.0}

    def lived(folder: Path, processes: int, wrong: dict[int, int]) -> list[tuple[int, str]]:
        """Exit codes and words of the processes; `wrong` is by process the replay that goes wrong there."""
        told = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_PROCESSES": str(processes)}
        told["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={2 // processes}"
        if processes > 1:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                told["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{probe.getsockname()[1]}"
        started = []
        for index in range(processes):
            faults = json.dumps(poison | {"wrong": wrong.get(index, 0)})
            command = [sys.executable, "-m", "tests.soak.trainer", faults, str(folder)]
            mine = told | {"JAX_PROCESS_ID": str(index)}
            started.append(subprocess.Popen(command, cwd=ROOT, env=mine, stderr=subprocess.PIPE, text=True))
        said = [process.communicate(timeout=600)[1] for process in started]
        return [(process.returncode, words) for process, words in zip(started, said, strict=True)]

    one, two = prepared(run, tmp_path / "one"), prepared(run, tmp_path / "two")
    assert lived(one, 1, {})[0][0] == 0
    for code, said in lived(two, 2, {1: 2}):
        assert code == 75 and "step 8 gave other bits" in said, said[-3000:]
    assert json.loads((two / CORRUPTION).read_text())["step"] == 8
    assert [code for code, _ in lived(two, 2, {})] == [0, 0]
    for folder in (one, two):
        (skip,) = Skips.load(folder, 8).found
        assert (skip.first_row, skip.stop_row) == (56, 96)
    losses = [[line["loss"] for line in lines(folder, "train").values()] for folder in (one, two)]
    assert len(losses[0]) == STEPS
    np.testing.assert_allclose(losses[1], losses[0], atol=1e-5)
