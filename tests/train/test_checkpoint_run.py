"""Checkpoints of whole runs: on each host, on a full disk, and read while they are written."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmgpt.core.log import Metrics
from mmgpt.interop.export import Export
from mmgpt.train.loop import train
from mmgpt.train.run import Opened, Run, open_run
from tests import tiny
from tests.small_disk import small_disk
from tests.train.test_loop import ROOT, finish, prepared, same_end, start, wait_for


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose data and tokenizers are written."""
    return tiny.run(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def undisturbed(made: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = prepared(made, tmp_path_factory.mktemp("runs") / "undisturbed")
    finish(start(folder))
    return folder


def test_a_killed_run_goes_on_from_its_host_bit_for_bit(undisturbed: Path, made: Run, tmp_path: Path) -> None:
    folder = prepared(made, tmp_path / "killed")
    options = ["--save-every", "100", "--checkpoint.local", str(tmp_path / "ram"), "--checkpoint.local-every", "2"]
    process = start(folder, *options)
    assert wait_for(process, folder, 7)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not [path for path in (folder / "checkpoints").iterdir() if path.name[0].isdecimal()]
    out = finish(start(folder, *options))
    assert int(out.partition("going on from step ")[2].split()[0]) in (4, 6, 8, 10)
    assert same_end(folder, undisturbed, made)


def start_two(folder: Path, *arguments: str) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    told = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    told["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
    return [start(folder, *arguments, **told, JAX_PROCESS_ID=str(i)) for i in range(2)]


@pytest.mark.slow
@pytest.mark.multiproc
def test_a_killed_run_of_two_processes_goes_on_from_its_hosts_and_exports(made: Run, tmp_path: Path) -> None:
    local = ["--checkpoint.local", str(tmp_path / "ram"), "--checkpoint.local-every", "2", "--export-every", "12"]
    whole, folder = prepared(made, tmp_path / "undisturbed"), prepared(made, tmp_path / "killed")
    for process in start_two(whole):
        finish(process)
    both = start_two(folder, *local, "--save-every", "100")
    assert wait_for(both[0], folder, 7)
    for process in both:
        process.kill()
        process.communicate()
    outs = [finish(process) for process in start_two(folder, *local)]
    assert all(int(out.partition("going on from step ")[2].split()[0]) in (4, 6, 8, 10) for out in outs)
    assert same_end(folder, whole, made)
    assert converted(folder, tmp_path / "converted") == 12
    for name in ("config.json", "model.safetensors"):
        assert (folder / "exports" / "12" / name).read_bytes() == (tmp_path / "converted" / name).read_bytes()


def test_a_full_disk_costs_saves_and_not_the_run(made: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    opened: list[int] = []
    with small_disk(tmp_path / "disk", "4m") as disk:
        filler = disk / "filler"

        def hook(model: Opened, metrics: Metrics) -> None:
            if model.step == 4:
                while not (disk / "run" / "checkpoints" / "2").exists():
                    time.sleep(0.01)
                with pytest.raises(OSError, match="No space"), open(filler, "wb", buffering=0) as file:
                    while True:
                        file.write(bytes(4096))
            elif model.step == 8:
                opened.append(open_run(disk / "run").step)
                filler.unlink()

        train(made.replace(evaluate_every=4), disk / "run", hook)
        told = capsys.readouterr().err
        lost = [step for step in range(2, 14, 2) if f"checkpoint {step} was not saved" in told]
        assert lost == [4, 6] and "failed in a row: 2" in told and "writes lost" in told
        assert [*opened, open_run(disk / "run").step] == [2, made.steps]


def converted(source: Path, out: Path) -> int:
    """What `mmgpt convert` makes of a run; the step that it took."""
    command = [sys.executable, "-m", "mmgpt", "convert", str(source), str(out)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "damaged" not in done.stderr and sorted(os.listdir(out)) == ["config.json", "model.safetensors"]
    return int(done.stderr.partition("at step ")[2].split()[0])


def test_a_living_run_is_converted_at_any_moment(made: Run, tmp_path: Path) -> None:
    folder = prepared(made, tmp_path / "run")
    process = start(folder, "--steps", "100000", "--save-every", "1", "--checkpoint.keep", "2")
    try:
        assert wait_for(process, folder, 3)
        steps = [converted(folder, tmp_path / f"out-{number}") for number in range(3)]
        assert process.poll() is None and 0 < steps[0] < steps[1] < steps[2]
    finally:
        process.kill()
        process.communicate()


def test_a_run_exports_what_convert_would_make_of_it(made: Run, tmp_path: Path) -> None:
    folder = prepared(made.replace(ema=0.9), tmp_path / "run")
    finish(start(folder, "--export-every", "6"))
    assert sorted(os.listdir(folder / "exports")) == ["12", "6"]
    assert converted(folder, tmp_path / "converted") == 12
    for name in ("config.json", "model.safetensors"):
        assert (folder / "exports" / "12" / name).read_bytes() == (tmp_path / "converted" / name).read_bytes()
    assert (folder / "exports" / "6" / name).read_bytes() != (folder / "exports" / "12" / name).read_bytes()


def test_an_export_that_fails_is_told_and_leaves_nothing(
    made: Run, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = made.replace(export_every=4, evaluate_every=8, save_every=8, steps=8)
    with small_disk(tmp_path / "disk", "4m") as disk, Export(run, disk / "run") as export:

        def failing(model: Opened, metrics: Metrics) -> None:
            filler = disk / "filler"
            if model.step == 4:
                with pytest.raises(OSError, match="No space"), open(filler, "wb", buffering=0) as file:
                    while True:
                        file.write(bytes(4096))
            export(model, metrics)
            export.__exit__()
            filler.unlink(missing_ok=True)

        train(run, disk / "run", export=failing)
        assert "no export of step 4: OSError" in capsys.readouterr().err
        assert os.listdir(disk / "run" / "exports") == ["8"]


def test_a_model_that_hugging_face_does_not_hold_is_told_before_the_run(made: Run, tmp_path: Path) -> None:
    vision = tiny.config.load(Path(made.tokens.vision) / "config.json") if made.tokens else None
    out = finish(start(prepared(vision, tmp_path / "run"), "--export-every", "6"), code=1)
    assert "no model that Hugging Face folders hold" in out and "Traceback" not in out
