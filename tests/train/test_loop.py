"""Whole runs, in processes of their own as `mmgpt train FOLDER`: repeatable, and not harmed by what ends them."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from mmgpt.core import config
from mmgpt.core.config import ConfigError
from mmgpt.core.errors import UserError
from mmgpt.core.log import read_metrics
from mmgpt.data.mixture import Change
from mmgpt.dist.mesh import Mesh
from mmgpt.train import state as states
from mmgpt.train.checkpoint import CheckpointError
from mmgpt.train.loop import train
from mmgpt.train.run import Run, alone, build, build_rows, goes_on, record
from mmgpt.train.state import Structure
from tests import tiny
from tests.small_disk import small_disk

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose data and tokenizers are written."""
    return tiny.run(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def undisturbed(made: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = prepared(made, tmp_path_factory.mktemp("runs") / "undisturbed")
    finish(start(folder))
    return folder


def prepared(run: Run, folder: Path) -> Path:
    """A run folder as another machine may have begun it: only its config is there."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config.to_json(run))
    return folder


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "mmgpt", "train", str(folder), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == code, out[-3000:]
    return out


def lines(folder: Path, kind: str) -> dict[int, dict]:
    """Metrics lines of one kind by step; each step once."""
    found = [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == kind]
    assert len({line["step"] for line in found}) == len(found)
    return {line["step"]: line for line in found}


def arrays(folder: Path, run: Run) -> dict[str, np.ndarray]:
    """Everything that the run's last checkpoint holds."""
    with jax.set_mesh(Mesh.Config().build(jax.devices()[:1])):
        structure = Structure(run.model.fit(tiny.grammar().vocabulary).build, seed=0)
        whole = states.abstract(structure, run.optimizer.build(run.steps), run.ema is not None)
        with run.checkpoint.build(folder / "checkpoints", read_only=True) as checkpoints:
            restored = checkpoints.restore(whole, run.steps)
    assert restored is not None
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(restored.state)}


def same_end(a: Path, b: Path, run: Run) -> bool:
    """Whether two runs end in the same arrays, bit for bit, and told the same losses for each step."""
    first, second = arrays(a, run), arrays(b, run)
    assert first.keys() == second.keys() and len(first) > 30
    told = [{step: line["loss"] for step, line in lines(folder, "train").items()} for folder in (a, b)]
    assert set(told[0]) == set(range(1, run.steps + 1))
    return told[0] == told[1] and all(np.array_equal(first[name], second[name]) for name in first)


def wait_for(process: subprocess.Popen, folder: Path, step: int) -> bool:
    """Waits until a step is told in the metrics; False if the process ended before."""
    while process.poll() is None:
        path = folder / "metrics.jsonl"
        if path.exists() and any(line["step"] >= step for line in read_metrics(path)):
            return True
        time.sleep(0.02)
    return False


def test_a_run_leaves_what_it_promises(undisturbed: Path, made: Run) -> None:
    train, held_out = lines(undisturbed, "train"), lines(undisturbed, "held_out")
    assert sorted(train) == list(range(1, made.steps + 1)) and sorted(held_out) == [6, 12]
    assert train[made.steps]["loss"] < train[1]["loss"]
    for source in ("left", "right"):
        for metric in ("next_token", "loss/text", "loss/image", "loss/video", "accuracy/image"):
            assert np.isfinite(held_out[12][f"{source}/{metric}"])
    assert {"step_seconds", "flops_per_second", "matmul_share", "data_wait_share"} <= train[made.steps].keys()
    assert sorted(int(p.name) for p in (undisturbed / "checkpoints").iterdir()) == [8, 10, 12]
    assert config.load(undisturbed / "config.json") == made
    assert "train" in (undisturbed / "command.txt").read_text()
    assert set(json.loads((undisturbed / "data.json").read_text())["sources"]) == {"left", "right"}
    assert (undisturbed / "tensorboard").is_dir()


def test_the_same_seed_gives_the_same_run_bit_for_bit(undisturbed: Path, made: Run, tmp_path: Path) -> None:
    again = prepared(made, tmp_path / "again")
    finish(start(again))
    assert same_end(again, undisturbed, made)


def test_sigterm_saves_and_the_same_command_goes_on(undisturbed: Path, made: Run, tmp_path: Path) -> None:
    folder = prepared(made, tmp_path / "stopped")
    process = start(folder, "--save-every", "1000")
    assert wait_for(process, folder, 2)
    process.send_signal(signal.SIGTERM)
    out = finish(process, code=75)
    (saved,) = [int(p.name) for p in (folder / "checkpoints").iterdir()]
    assert f"saved at step {saved}; run the same command" in out and 2 <= saved < made.steps
    out = finish(start(folder, "--save-every", "1000"))
    assert f"going on from step {saved} of {made.steps}" in out
    assert same_end(folder, undisturbed, made)


def test_a_finished_run_has_nothing_to_do(undisturbed: Path, made: Run, tmp_path: Path) -> None:
    folder = tmp_path / "finished"
    shutil.copytree(undisturbed, folder)
    before = (folder / "metrics.jsonl").read_bytes()
    finish(start(folder))
    assert (folder / "metrics.jsonl").read_bytes() == before


# --- what does not fit


def test_a_folder_of_another_config_is_told_and_stays(undisturbed: Path) -> None:
    before = (undisturbed / "config.json").read_bytes()
    out = finish(start(undisturbed, "--optimizer.learning-rate", "5e-3", "--steps", "20"), code=1)
    assert "holds a run of another config" in out and "optimizer.learning_rate: 0.01 there, 0.005 asked" in out
    assert "steps" not in out.partition("another config")[2] and "Traceback" not in out
    assert (undisturbed / "config.json").read_bytes() == before


def test_a_checkpoint_of_another_config_is_told(undisturbed: Path, made: Run, tmp_path: Path) -> None:
    folder = prepared(made.replace(model=made.model.replace(mlp=48)), tmp_path / "other")
    shutil.copytree(undisturbed / "checkpoints", folder / "checkpoints")
    out = finish(start(folder), code=1)
    assert "is of another config" in out and "mlp/gate" in out and "Traceback" not in out


def test_missing_data_is_told(made: Run, tmp_path: Path) -> None:
    data = made.data.replace(sources=(made.data.sources[0].replace(path=str(tmp_path / "nowhere")),))
    out = finish(start(prepared(made.replace(data=data), tmp_path / "run")), code=1)
    assert "nowhere" in out and "Traceback" not in out


def claim(run: Run, folder: Path) -> bool:
    known = goes_on(run, folder)
    record(run, folder, known)
    return known


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 0),
        ("microbatches", 3),
        ("mesh.fsdp", 3),
        ("spikes.skip", -1),
        ("checkpoint.keep", 0),
        ("data.threads", -1),
        ("data.batch_rows", 0),
    ],
)
def test_a_config_that_cannot_run_leaves_the_one_that_could(made: Run, tmp_path: Path, key: str, value: int) -> None:
    folder = prepared(made, tmp_path / "run")
    before = (folder / "config.json").read_bytes()
    part, _, leaf = key.rpartition(".")
    changed = made.replace(**{part: getattr(made, part).replace(**{leaf: value})} if part else {leaf: value})
    with pytest.raises(UserError, match=leaf):
        train(changed, folder)
    assert (folder / "config.json").read_bytes() == before
    assert not (folder / "command.txt").exists()


def test_what_a_step_does_not_compute_may_change(made: Run, tmp_path: Path) -> None:
    assert claim(made.replace(seed=2), tmp_path / "run") is False
    assert claim(made, tmp_path / "run") is False  # nothing was trained there yet
    (tmp_path / "run" / "metrics.jsonl").write_text("{}")
    assert claim(made.replace(steps=99, log_every=2, samples=1, save_every=7), tmp_path / "run") is True
    with pytest.raises(ConfigError, match=r"seed: 0 there, 1 asked\nGive another --run-dir"):
        claim(made.replace(seed=1), tmp_path / "run")
    assert (tmp_path / "run" / "commit.txt").exists()


def test_a_mixture_may_change_after_the_last_step_saved(made: Run, tmp_path: Path) -> None:
    def changed(*steps: int) -> Run:
        sources = made.data.sources[:1]
        return made.replace(data=made.data.replace(changes=tuple(Change(step=s, sources=sources) for s in steps)))

    claim(changed(4), tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text("{}")
    (tmp_path / "run" / "checkpoints" / "6").mkdir(parents=True)
    assert claim(changed(4, 6), tmp_path / "run") is True
    assert claim(changed(4, 9), tmp_path / "run") is True
    for steps in ((3, 9), (4, 5), (9,)):
        with pytest.raises(ConfigError, match=r"(?s)data\.changes.*may begin at step 6"):
            claim(changed(*steps), tmp_path / "run")
    assert '"step": 9' in (tmp_path / "run" / "config.json").read_text()


def test_one_process_at_a_time_trains_in_a_folder(tmp_path: Path) -> None:
    with alone(tmp_path), pytest.raises(ConfigError, match="another process trains there"), alone(tmp_path):
        pass
    with alone(tmp_path):
        pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"log_every": 0}, "log_every is 0"),
        ({"save_every": -1}, "save_every is -1"),
        ({"ema": 2.0}, "ema is 2.0"),
        ({"mesh": Mesh.Config(cpu_devices=0)}, "mesh.cpu_devices is 0"),
    ],
)
def test_numbers_that_make_no_run_are_told(made: Run, change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(made.replace(**change))


def test_rows_that_do_not_divide_over_the_devices_are_told(made: Run, tmp_path: Path) -> None:
    built = build(made.replace(data=made.data.replace(batch_rows=3)))
    with pytest.raises(ConfigError, match="batch_rows 3 does not divide over 8 devices"):
        build_rows(built, tmp_path)


def test_a_run_that_cannot_be_saved_does_not_end_well(made: Run, tmp_path: Path) -> None:
    run = made.replace(steps=2, save_every=2, evaluate_every=2, optimizer=made.optimizer.replace(warmup=1))
    told = pytest.raises(CheckpointError, match="step 2 is done, but could not be saved")
    with small_disk(tmp_path / "disk", "300k") as disk, told:
        train(run, disk / "run")


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize("mesh", [Mesh.Config(), Mesh.Config(fsdp=1, tensor=2)], ids=["rows", "tensor"])
def test_two_processes_train_as_one_with_as_many_devices(made: Run, tmp_path: Path, mesh: Mesh.Config) -> None:
    run = made.replace(mesh=mesh)
    devices = "--xla_force_host_platform_device_count="
    alone_folder, both = prepared(run, tmp_path / "one"), prepared(run, tmp_path / "two")
    finish(start(alone_folder, XLA_FLAGS=f"{devices}2"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    told = {"XLA_FLAGS": f"{devices}1", "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    for process in [start(both, **told, JAX_PROCESS_ID=str(i)) for i in range(2)]:
        finish(process)
    for kind in ("train", "held_out"):
        one, two = lines(alone_folder, kind), lines(both, kind)
        assert one.keys() == two.keys() != set()
        for step in one:
            for name in (name for name in one[step] if "loss" in name or "next_token" in name):
                assert two[step][name] == pytest.approx(one[step][name], abs=1e-5), (step, name)
    assert len((both / "command.txt").read_text().splitlines()) == 1
