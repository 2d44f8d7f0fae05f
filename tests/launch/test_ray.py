"""Ray jobs on a real cluster of two nodes on this machine: followed to their end, started again, exact after it."""

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmgpt.core.log import read_metrics
from tests.launch.jobs import HOSTILE, command, launched, prepared, script
from tests.train.test_loop import same_end

pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The job interface of a Ray cluster, which ends with the tests."""
    if importlib.util.find_spec("ray") is None or importlib.util.find_spec("aiohttp_cors") is None:
        pytest.skip("ray[default] is not installed: Ray has no job interface without it")
    ray = Path(sys.executable).with_name("ray")
    with contextlib.ExitStack() as held, tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        port, jobs = free_port(), free_port()
        held.enter_context(
            node(ray, folder, "--head", f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={jobs}")
        )
        until_open(jobs)
        held.enter_context(node(ray, folder, f"--address=127.0.0.1:{port}"))
        yield f"http://127.0.0.1:{jobs}"
        held.close()


@contextlib.contextmanager
def node(ray: Path, folder: str, *options: str) -> Iterator[None]:
    """A node with two CPUs as Ray counts them; JAX's share of the machine is no matter of Ray's."""
    started = [str(ray), "start", "--block", "--num-cpus=2", "--disable-usage-stats", *options]
    environment = os.environ | {"RAY_TMPDIR": folder, "JAX_PLATFORMS": "cpu"}
    with open(f"{folder}/out", "ab") as out:
        process = subprocess.Popen(started, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until_open(port: int) -> None:
    end = time.monotonic() + 120
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        assert time.monotonic() < end, "Ray's job interface does not answer"
        time.sleep(0.2)


def stand_in(folder: Path, trainer: str) -> Path:
    """An interpreter that runs lines of bash instead of the trainer, and everything else, as the driver, for real."""
    return script(
        folder / "python", f'if [ "$3" != train ]; then exec {sys.executable} "$@"; fi\ncd {folder}\n{trainer}'
    )


def submit(address: str, run_dir: Path, python: Path, *arguments: str, code: int = 0) -> str:
    options = ["--backend", "ray", "--ray.address", address, "--run-dir", run_dir, "--job.python", python]
    done = launched("quickstart_model", *options, *arguments, code=code)
    return done.stdout + done.stderr


def test_a_job_that_fails_makes_the_command_fail(address: str, tmp_path: Path) -> None:
    python = stand_in(tmp_path, "echo . >> runs; exit 9")
    said = submit(address, tmp_path / "run", python, "--job.name", "fails", "--job.max-restarts", "1", code=1)
    assert (tmp_path / "runs").exists(), said
    assert (tmp_path / "runs").read_text() == ".\n.\n"
    assert "failure 2 of at most 2: exit code 9" in said and "Job 'fails-1' failed" in said


def test_a_preempted_job_is_started_again_without_counting(address: str, tmp_path: Path) -> None:
    python = stand_in(tmp_path, "echo . >> runs; [ $(wc -l < runs) -gt 2 ] || exit 75; echo done here")
    said = submit(address, tmp_path / "run", python, "--job.name", "comes-back", "--job.max-restarts", "0")
    assert (tmp_path / "runs").read_text() == ".\n.\n.\n"
    assert said.count("preempted and saved; starting again") == 2 and "done here" in said


def test_a_sweep_is_submitted_and_not_waited_for(address: str, tmp_path: Path) -> None:
    python = stand_in(tmp_path, "while [ ! -e go ]; do sleep 0.1; done; echo . >> runs")
    said = submit(address, tmp_path / "run", python, "--job.name", "sweeps", "--sweep", "seed=1,2")
    assert "sweeps-0-1" in said and "sweeps-1-1" in said and not (tmp_path / "runs").exists()
    (tmp_path / "go").touch()
    end = time.monotonic() + 120
    while not (tmp_path / "runs").exists() or (tmp_path / "runs").read_text() != ".\n.\n":
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.multiproc
def test_two_nodes_train_and_resume_exactly(address: str, tmp_path: Path) -> None:
    base, run = prepared(tmp_path, steps=60, save_every=10, evaluate_every=30)
    options = [base, "--backend", "ray", "--ray.address", address, "--job.nodes", "2"]
    environment = {"PYTHONPATH": os.environ.get("PYTHONPATH", ""), "XLA_FLAGS": ""}
    launched(*options, "--run-dir", tmp_path / "undisturbed", "--job.name", "undisturbed", **environment)
    run_dir = tmp_path / HOSTILE
    arguments = command(*options, "--run-dir", run_dir, "--job.name", "disturbed")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, stderr=subprocess.STDOUT) as process:
        path = run_dir / "metrics.jsonl"
        while not path.exists() or not any(line["step"] >= 25 for line in read_metrics(path)):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        os.kill(trainers(run_dir)[0], signal.SIGTERM)
        said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "preempted and saved; starting again" in said
    assert same_end(tmp_path / "undisturbed", run_dir, run)


def trainers(run_dir: Path) -> list[int]:
    """The processes that train in a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if b"mmgpt" in words and str(run_dir).encode() in words and b"train" in words:
                found.append(int(path.parent.name))
    return sorted(found)
