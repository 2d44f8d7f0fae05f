"""Slurm jobs on a real cluster of two nodes: preempted, cancelled, a node lost, an array; the long form is a soak test.

python -m tests.soak.slurm --times 10
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.jobs import HOSTILE, launched, script
from tests.launch.slurm_cluster import Cluster, Unavailable, cluster
from tests.soak import slurm

pytestmark = [pytest.mark.slow, pytest.mark.slurm]


@pytest.fixture(scope="module")
def on() -> Iterator[Cluster]:
    try:
        with cluster() as made:
            yield made
    except Unavailable as why:
        pytest.skip(f"no Slurm cluster can be started here: {why}")


def submit(on: Cluster, run_dir: Path, python: Path, *arguments: str) -> str:
    """Launches a stand-in for the trainer; returns the job's number."""
    options = ["--backend", "slurm", "--run-dir", run_dir, "--job.python", python, "--slurm.cpus-per-process", "1"]
    done = launched("quickstart_model", *options, "--job.name", "job", *arguments, **on.environment)
    found = re.search(r"Submitted batch job (\d+)", done.stdout)
    assert found is not None, done.stdout
    return found[1]


def ended(on: Cluster, job: str, run_dir: Path) -> dict[str, str]:
    return on.ended(job, lambda: slurm.said(run_dir))


@pytest.mark.multiproc
def test_a_preempted_run_and_one_that_lost_a_node_resume_exactly(on: Cluster, tmp_path: Path) -> None:
    """One of each fault, with the real trainer on both nodes."""
    lines = slurm.soak(2, 1, tmp_path, on)
    assert [line.split()[1] for line in lines] == ["term", "loss"]


def test_hostile_names_reach_the_processes_of_both_nodes(on: Cluster, tmp_path: Path) -> None:
    python = script(
        tmp_path / "python", f'cd {tmp_path}; echo "$JAX_NUM_PROCESSES $JAX_PROCESS_ID" "$@" > "seen-$JAX_PROCESS_ID"'
    )
    run_dir = tmp_path / f"%j {HOSTILE}"
    job = submit(on, run_dir, python, "--job.nodes", "2", "--slurm.options", "--comment=it's $HOME")
    assert ended(on, job, run_dir)["JobState"] == "COMPLETED", slurm.said(run_dir)
    for number in range(2):
        seen = (tmp_path / f"seen-{number}").read_text()
        assert seen == f"2 {number} -m mmgpt train {run_dir}/jobs/1/tasks/0 --run-dir {run_dir}\n"
    assert (run_dir / "jobs" / "1" / "logs" / f"slurm-{job}.log").is_file()
    assert "it's $HOME" in on.run("scontrol", "show", "job", job)


def test_a_failing_run_is_started_again_so_often_and_no_more(on: Cluster, tmp_path: Path) -> None:
    python = script(tmp_path / "python", f"echo . >> {tmp_path}/runs; exit 9")
    job = submit(on, tmp_path / "run", python, "--job.max-restarts", "2")
    state = ended(on, job, tmp_path / "run")
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "9:0", "0")
    assert (tmp_path / "runs").read_text() == ".\n" * 3


def test_a_cancelled_job_does_not_come_back(on: Cluster, tmp_path: Path) -> None:
    """All processes get SIGTERM and save, and exit with 75; but who cancels a job wants it to end."""
    python = script(tmp_path / "python", f'trap "exit 75" TERM; touch {tmp_path}/begun; while true; do sleep 0.1; done')
    job = submit(on, tmp_path / "run", python)
    on.until(lambda: (tmp_path / "begun").exists(), lambda: slurm.said(tmp_path / "run"))
    on.run("scancel", job)
    state = ended(on, job, tmp_path / "run")
    assert (state["JobState"], state["Restarts"]) == ("CANCELLED", "0")


def test_an_array_trains_each_run_of_a_sweep_in_its_folder(on: Cluster, tmp_path: Path) -> None:
    python = script(tmp_path / "python", f'echo "$@" > {tmp_path}/seen-$(basename "${{@: -1}}")')
    job = submit(on, tmp_path / "run", python, "--sweep", "seed=1,2")
    for task in range(2):
        on.until(lambda name=f"seen-{task}": (tmp_path / name).exists(), lambda: slurm.said(tmp_path / "run"))
        folder = tmp_path / "run"
        assert (tmp_path / f"seen-{task}").read_text() == (
            f"-m mmgpt train {folder}/jobs/1/tasks/{task} --run-dir {folder}/{task}\n"
        )
    on.until(lambda: job not in on.run("squeue", "--noheader", "--format=%F"), "the array is still in the queue")


def test_what_no_partition_has_is_refused(on: Cluster, tmp_path: Path) -> None:
    options = ["--backend", "slurm", "--run-dir", tmp_path / "run", "--slurm.cpus-per-process", "1", "--job.nodes", "9"]
    done = launched("quickstart_model", *options, code=1, **on.environment)
    assert "node configuration is not available" in done.stderr and "Traceback" not in done.stderr
    assert on.run("squeue", "--noheader") == ""


def test_a_folder_that_a_node_does_not_see_is_told(on: Cluster, tmp_path: Path) -> None:
    """The script as sbatch has taken it, while the folder is gone."""
    python = script(tmp_path / "python", "exit 0")
    job = submit(on, tmp_path / "run", python, "--slurm.options=--hold")
    (tmp_path / "run" / "jobs" / "1" / "start.sh").unlink()
    on.run("scontrol", "release", job)
    assert ended(on, job, tmp_path / "run")["JobState"] == "FAILED"
    assert "the run folder must lie on storage that they share" in slurm.said(tmp_path / "run")


def test_the_time_limit_saves_and_queues_again(on: Cluster, tmp_path: Path) -> None:
    """Slurm sends the signal up to a minute early: with a limit of a minute, it comes at once."""
    trainer = f'echo . >> {tmp_path}/runs; [ $(wc -l < {tmp_path}/runs) -lt 2 ] || exit 0; trap "exit 75" TERM'
    python = script(tmp_path / "python", f"{trainer}; while true; do sleep 0.1; done")
    job = submit(on, tmp_path / "run", python, "--job.minutes", "1", "--job.grace", "30")
    on.requeued(job)
    state = ended(on, job, tmp_path / "run")
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1")
    assert (tmp_path / "runs").read_text() == ".\n.\n"
