"""What each backend writes: readable, as it was reviewed, and proof against names that a shell would take apart.

When a backend changes on purpose, its golden text is written anew with

    MMGPT_WRITE_GOLDEN=1 python -m pytest tests/launch/test_render.py

and the difference is reviewed with the change.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from mmgpt.launch.command import shown
from mmgpt.launch.gcloud import Gcloud
from mmgpt.launch.process import start_script
from mmgpt.launch.slurm import Slurm
from mmgpt.launch.spec import Job

from tests.launch.jobs import GCLOUD, HOSTILE, JOBSET, PLATFORMS, job, script, spec

GOLDEN = Path(__file__).parents[1] / "golden" / "launch"
SWEEP = ("optimizer.learning_rate=1e-4,3e-4", "seed=1,2")
SETUP = {"setup": ("module load cuda/13",), "environment": ("XLA_FLAGS=--xla_a --xla_b",)}
JOBS: dict[str, Job] = {
    "local": job(spec(PLATFORMS["local"], processes_per_node=2)),
    "slurm": job(spec(PLATFORMS["slurm"], nodes=16, chips_per_node=8, minutes=24 * 60, **SETUP)),
    "slurm_sweep": job(
        spec(
            Slurm(partition="gpu", account="lab", qos="high", cpus_per_process=4, options=("--constraint=ib",)),
            processes_per_node=4,
            chips_per_node=4,
            accelerator="h100",
            sweep=SWEEP,
        ),
        4,
    ),
    "jobset": job(spec(JOBSET, nodes=2, chips_per_node=8, accelerator="nvidia-h100-80gb")),
    "jobset_tpu": job(
        spec(
            JOBSET.replace(topology="4x4x4", queue="research", namespace="lab"),
            nodes=16,
            chips_per_node=4,
            accelerator="tpu-v5p-slice",
            minutes=600,
        )
    ),
    "ray": job(spec(PLATFORMS["ray"], nodes=2, chips_per_node=8)),
    "ray_sweep": job(spec(PLATFORMS["ray"], sweep=("seed=1,2",)), 2),
    "gcloud": job(spec(GCLOUD, nodes=8, accelerator="v5p-64")),
    "gcloud_sweep": job(
        spec(
            GCLOUD.replace(spot=True, network="lab", subnetwork="tpus"),
            nodes=4,
            accelerator="v6e-16",
            sweep=("seed=1,2",),
        ),
        2,
    ),
}


@pytest.mark.parametrize("name", JOBS)
def test_a_submission_is_as_it_was_reviewed(name: str) -> None:
    file = GOLDEN / f"{name}.txt"
    text = shown(JOBS[name])
    if "MMGPT_WRITE_GOLDEN" in os.environ:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert file.exists(), f"{file} is missing; {__doc__}"
    assert text == file.read_text(), f"{name} differs from {file}; {__doc__}"


def test_every_golden_text_is_of_a_job() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(JOBS)


def scripts(found: Job) -> dict[str, str]:
    """The shell scripts of a submission."""
    files = {"start.sh": start_script(found), **found.spec.platform.render(found)}
    return {name: text for name, text in files.items() if not name.endswith(".json")}


@pytest.mark.parametrize("name", JOBS)
def test_scripts_are_sound_shell(name: str, tmp_path: Path) -> None:
    for file, text in scripts(JOBS[name]).items():
        (tmp_path / file).write_text(text)
        subprocess.run(["bash", "-n", tmp_path / file], check=True)
        if shutil.which("shellcheck"):
            subprocess.run(["shellcheck", "--shell=bash", tmp_path / file], check=True)


SHOW = """
printf '%s\\n' "$PWD" "$PYTHONPATH" "$NASTY" "$@" > "$SHOWN"
"""


def started(folder: Path, found: Job, *command: str, **environment: str) -> list[str]:
    """What a process of a job sees: working folder, code, a variable, arguments."""
    found.folder.mkdir(parents=True)
    (found.folder / "logs").mkdir()
    for name, text in scripts(found).items():
        (found.folder / name).write_text(text)
    told = os.environ | {"SHOWN": str(folder / "shown")} | environment
    subprocess.run(["bash", *command], check=True, env=told, cwd="/")
    return (folder / "shown").read_text().splitlines()


@pytest.mark.parametrize("sweep", [(), ("seed=1,2",)], ids=["one", "sweep"])
def test_a_process_gets_hostile_names_unharmed(tmp_path: Path, sweep: tuple[str, ...]) -> None:
    run_dir, workdir = tmp_path / f"run {HOSTILE}", tmp_path / f"data {HOSTILE}"
    workdir.mkdir()
    python = script(tmp_path / f"bin {HOSTILE}" / "python", SHOW)
    asked = spec(
        PLATFORMS["slurm"],
        run_dir=str(run_dir),
        workdir=str(workdir),
        python=str(python),
        environment=(f"NASTY={HOSTILE}",),
        sweep=sweep,
    )
    found = job(asked, 2 if sweep else 1)
    seen = started(tmp_path, found, str(found.folder / "start.sh"), "1" if sweep else "0", SLURM_PROCID="3")
    task = "1" if sweep else "0"
    trained = [str(found.folder / "tasks" / task), "--run-dir", str(run_dir / task if sweep else run_dir)]
    assert seen == [str(workdir), str(found.folder / "code"), HOSTILE, "-m", "mmgpt", "train", *trained]


def test_a_host_of_a_slice_starts_again_until_the_run_is_done(tmp_path: Path) -> None:
    """The startup script as it is, with a stand-in for the interpreter: preempted twice, failed once, then done."""
    python = script(
        tmp_path / "python",
        'echo . >> "$SHOWN"; case $(wc -l < "$SHOWN") in 1) exit 75 ;; 2) exit 9 ;; 3) exit 143 ;; esac; exit 0',
    )
    asked = spec(GCLOUD.replace(boot=()), run_dir=str(tmp_path / "run"), workdir=str(tmp_path), python=str(python))
    found = job(asked.replace(max_restarts=1))
    assert len(started(tmp_path, found, str(found.folder / "startup-0.sh"))) == 4
    (log,) = (found.folder / "logs").iterdir()
    assert log.name.startswith("emu3-8b-") and log.read_text() == "failure 1 of at most 2: exit code 9\n"


def test_a_host_of_a_slice_gives_up_after_the_last_restart(tmp_path: Path) -> None:
    python = script(tmp_path / "python", 'echo . >> "$SHOWN"; exit 9')
    asked = spec(GCLOUD.replace(boot=()), run_dir=str(tmp_path / "run"), workdir=str(tmp_path), python=str(python))
    found = job(asked.replace(max_restarts=2))
    with pytest.raises(subprocess.CalledProcessError) as e:
        started(tmp_path, found, str(found.folder / "startup-0.sh"))
    assert e.value.returncode == 9 and len((tmp_path / "shown").read_text().splitlines()) == 3


def test_a_manifest_holds_hostile_names_as_they_are() -> None:
    hostile = f"/srv/runs/{HOSTILE}"
    found = job(spec(JOBSET, run_dir=hostile))
    manifest = json.loads(JOBSET.render(found)["jobset-0.json"])
    (container,) = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["bash", f"{hostile}/jobs/1/start.sh", "0"]


def test_command_lines_are_lists_of_whole_arguments() -> None:
    for name, platform in PLATFORMS.items():
        hostile = f"/srv/runs/{HOSTILE}"
        for line in platform.commands(job(spec(platform, run_dir=hostile))):
            assert any(hostile in argument for argument in line), name


@pytest.mark.parametrize(
    ("accelerator", "hosts", "chips"),
    [
        ("v5p-8", 1, 4),
        ("v5p-64", 8, 32),
        ("v4-16", 2, 8),
        ("v5litepod-8", 1, 8),
        ("v5litepod-16", 4, 16),
        ("v6e-256", 64, 256),
    ],
)
def test_the_size_of_a_slice_follows_from_its_type(accelerator: str, hosts: int, chips: int) -> None:
    asked = spec(GCLOUD, accelerator=accelerator, nodes=hosts)
    asked.check()
    assert GCLOUD.chips(asked) == chips and isinstance(asked.platform, Gcloud)
