"""Processes on this machine: they begin and end together, start again when they should, and resume exactly."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mmgpt.launch import process
from mmgpt.launch.spec import Job

from mmgpt.core.log import read_metrics
from mmgpt.dist.hosts import REQUEUE
from mmgpt.train.run import Run
from tests.launch.jobs import HOSTILE, PLATFORMS, command, job, prepared, script, spec
from tests.train.test_loop import same_end


def ready(folder: Path, trainer: str, tasks: int = 1, **changes: object) -> Job:
    """A submission whose interpreter is a stand-in: lines of bash that get the trainer's arguments."""
    python = script(folder / "python", trainer)
    asked = spec(
        PLATFORMS["local"],
        run_dir=str(folder / f"run {HOSTILE}"),
        workdir=str(folder),
        python=str(python),
        sweep=() if tasks == 1 else ("seed=1,2",),
        **changes,
    )
    found = job(asked, tasks)
    (found.folder / "logs").mkdir(parents=True)
    (found.folder / "start.sh").write_text(process.start_script(found))
    return found


def submit(found: Job) -> int:
    return found.spec.platform.submit(found)


def log(found: Job, number: int, task: int = 0) -> str:
    return (found.folder / "logs" / f"{found.name(task)}-{number}.log").read_text()


def test_each_process_is_told_of_all(tmp_path: Path) -> None:
    tell = 'echo "$JAX_NUM_PROCESSES $JAX_PROCESS_ID $JAX_COORDINATOR_ADDRESS $*"'
    found = ready(tmp_path, tell, processes_per_node=3)
    assert submit(found) == 0
    said = [log(found, number).split(maxsplit=3) for number in range(3)]
    assert [(count, number) for count, number, *_ in said] == [("3", "0"), ("3", "1"), ("3", "2")]
    assert len({address for _, _, address, _ in said}) == 1 and said[0][2].startswith("127.0.0.1:")
    assert said[0][3].startswith("-m mmgpt train ")


def test_the_tasks_of_a_sweep_run_one_after_the_other(tmp_path: Path) -> None:
    found = ready(tmp_path, 'echo "${@: -1}" >> order; [ "${@: -1}" != "$0" ]', 2)
    assert submit(found) == 0
    assert (tmp_path / "order").read_text().splitlines() == [str(folder) for folder in found.run_dirs]


def test_a_task_that_fails_does_not_keep_the_others_from_running(tmp_path: Path) -> None:
    found = ready(tmp_path, 'echo . >> runs; case "${@: -1}" in */0) exit 7 ;; esac', 2, max_restarts=0)
    assert submit(found) == 7
    assert (tmp_path / "runs").read_text() == ".\n.\n"


@pytest.mark.parametrize("code", [REQUEUE, 128 + signal.SIGTERM])
def test_a_preempted_run_starts_again_without_counting(tmp_path: Path, code: int) -> None:
    found = ready(tmp_path, f"echo . >> runs; [ $(wc -l < runs) -gt 5 ] || exit {code}", max_restarts=0)
    assert submit(found) == 0
    assert len((tmp_path / "runs").read_text().splitlines()) == 6


def test_a_failing_run_starts_again_so_often_and_no_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = ready(tmp_path, "echo . >> runs; echo first; echo [why]; exit 9", max_restarts=2)
    assert submit(found) == 9
    assert "".join(capsys.readouterr()).count("-0.log ends: [why]\n") == 3
    assert len((tmp_path / "runs").read_text().splitlines()) == 3


def test_all_end_when_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "STRANDED", 0.5)
    trainer = 'echo $$; [ "$JAX_PROCESS_ID" = 1 ] && exit 5; trap "" TERM; while true; do sleep 0.1; done'
    found = ready(tmp_path, trainer, processes_per_node=2, max_restarts=0)
    assert submit(found) == 5
    with pytest.raises(ProcessLookupError):
        os.kill(int(log(found, 0)), 0)


def test_the_others_may_save_when_one_has_saved(tmp_path: Path) -> None:
    trainer = '[ "$JAX_PROCESS_ID" = 1 ] && exit 75; sleep 1; echo saved; touch done; exit 75'
    found = ready(tmp_path, f"[ -e done ] && exit 0; {trainer}", processes_per_node=2, max_restarts=0)
    assert submit(found) == 0
    assert log(found, 0) == "saved\n"


# --- with the real trainer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    return prepared(tmp_path_factory.mktemp("world"), steps=60, save_every=10, evaluate_every=30)


def started(base: Path, run_dir: Path, *arguments: str) -> subprocess.Popen[str]:
    """A launch of two processes."""
    options = ["--backend", "local", "--run-dir", str(run_dir), "--job.name", "run", "--job.processes-per-node", "2"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)
    return subprocess.Popen(
        command(base, *options, *arguments), env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finished(process: subprocess.Popen[str], run_dir: Path, code: int = 0) -> str:
    _, err = process.communicate(timeout=400)
    logs = "\n".join(path.read_text()[-2000:] for path in run_dir.glob("jobs/*/logs/*"))
    assert process.returncode == code, err + logs
    return err


@pytest.fixture(scope="module")
def undisturbed(made: tuple[Path, Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    finished(started(made[0], run_dir), run_dir)
    return run_dir


def trainers(run_dir: Path) -> list[int]:
    """The processes that train in a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"mmgpt" in words and str(run_dir).encode() in words and b"train" in words:
            found.append(int(path.parent.name))
    return sorted(found)


@pytest.fixture
def at_step(tmp_path: Path) -> Iterator[Callable[[subprocess.Popen[str], Path, int], None]]:
    """Waits until a run has done a step."""
    started: list[subprocess.Popen[str]] = []

    def wait(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
        started.append(process)
        path = run_dir / "metrics.jsonl"
        while not path.exists() or not any(line["step"] >= step for line in read_metrics(path)):
            assert process.poll() is None, finished(process, run_dir)
            time.sleep(0.02)

    yield wait
    for launch in started:
        if launch.poll() is None:
            os.killpg(launch.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.multiproc
def test_told_to_stop_all_save_and_the_next_launch_resumes_exactly(made, undisturbed, tmp_path, at_step) -> None:
    base, run = made
    run_dir = tmp_path / HOSTILE
    process = started(base, run_dir)
    at_step(process, run_dir, 15)
    process.terminate()
    assert "stopping: the processes save first" in finished(process, run_dir, REQUEUE)
    saved = max(int(path.name) for path in (run_dir / "checkpoints").iterdir())
    assert saved >= 15 and trainers(run_dir) == []
    finished(started(base, run_dir), run_dir)
    lines = (run_dir / "command.txt").read_text().splitlines()
    for number, line in enumerate(lines, 1):  # the code of each submission, though the checkout is the working folder
        assert line.startswith(f"{run_dir}/jobs/{number}/code/mmgpt/__main__.py train {run_dir}/jobs/{number}/tasks/0")
    assert len(lines) == 2 and same_end(undisturbed, run_dir, run)


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_is_taken_away_comes_back_and_resumes_exactly(
    made, undisturbed, tmp_path, at_step, number: int
) -> None:
    base, run = made
    run_dir = tmp_path / "run"
    process = started(base, run_dir)
    at_step(process, run_dir, 25)
    os.kill(trainers(run_dir)[1], number)
    said = finished(process, run_dir)
    assert ("preempted and saved; starting again" if number == signal.SIGTERM else "failure 1 of at most 4") in said
    assert same_end(undisturbed, run_dir, run)


@pytest.mark.slow
@pytest.mark.multiproc
def test_a_killed_launcher_leaves_nobody_behind(made, undisturbed, tmp_path, at_step) -> None:
    base, run = made
    run_dir = tmp_path / "run"
    process = started(base, run_dir)
    at_step(process, run_dir, 15)
    process.kill()
    process.communicate()
    end = time.monotonic() + 60
    while trainers(run_dir):
        assert time.monotonic() < end, "the processes train on"
        time.sleep(0.1)
    assert max(int(path.name) for path in (run_dir / "checkpoints").iterdir()) >= 15, "they saved"
    finished(started(base, run_dir), run_dir)
    assert same_end(undisturbed, run_dir, run)
