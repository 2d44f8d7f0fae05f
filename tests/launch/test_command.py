"""`mmgpt launch` refuses in one sentence what no backend could run, and writes a submission whole or not at all."""

import importlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from mmgpt.launch.command import BACKENDS
from mmgpt.launch.spec import JobSpec, LaunchError
from mmgpt.launch.sweep import combinations

from mmgpt import cli, presets
from mmgpt.core import config
from mmgpt.train.run import Run
from tests.launch.jobs import HOSTILE, JOBSET, PLATFORMS, command, job, prepared, script, spec
from tests.small_disk import small_disk

JOBSET_FLAGS = ("--jobset.image", "i", "--jobset.claim", "c", "--jobset.mount", "/srv")
GCLOUD_FLAGS = ("--gcloud.project", "p", "--gcloud.zone", "z", "--gcloud.runtime-version", "v")


def call(*arguments: object) -> int:
    try:
        return cli.main(["launch", *map(str, arguments)])
    except SystemExit as e:  # tyro exits by itself
        assert isinstance(e.code, int)
        return e.code


def told(capfd: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    """What a launch, and what it starts, say on stdout and stderr."""
    assert call(*arguments) == code
    return capfd.readouterr()


def error(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 1) -> str:
    """What a launch that is refused says."""
    assert call(*arguments) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and "Traceback" not in err
    return err


def dry(*arguments: object, backend: str = "slurm", run_dir: object = "/srv/runs/x") -> list[object]:
    return ["quickstart_model", "--backend", backend, "--run-dir", run_dir, "--dry-run", *arguments]


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["quickstrat_model", "--backend", "slurm"], "Did you mean quickstart_model"),
        (["quickstart", "--backend", "slurm"], "`mmgpt run quickstart` runs a recipe"),
        (dry(run_dir="runs/x"), "--run-dir runs/x: give the absolute path"),
        (dry(run_dir="/srv/../x"), "--run-dir /srv/../x: give the absolute path"),
        (dry(run_dir="/etc/passwd/x"), "--run-dir /etc/passwd/x: /etc/passwd is a file; name a folder."),
        (
            dry("--optimizer.warmup", "90", "--steps", "90"),
            "optimizer.warmup 90 is not shorter than the run of 90 steps",
        ),
        (dry(run_dir="/srv/runs[1]"), "no checkpoint can be written under a path with ["),
        (dry(run_dir="/srv/a\nb"), "job.run_dir holds '/srv/a\\nb': give it without line breaks"),
        (dry(run_dir="/srv/a\\b"), "sbatch reads a backslash as an escape"),
        (dry(run_dir="/dev/shm/x"), "lies on tmpfs (/dev/shm), which no other machine sees"),
        (dry("--job.workdir", "data"), "job.workdir data: give an absolute path"),
        (dry("--job.name", "Run_1"), "job.name 'Run_1' is no DNS label"),
        (dry("--job.name", "1st"), "job.name '1st' is no DNS label"),
        (dry("--job.name", "a-"), "is no DNS label"),
        (dry("--job.name", "a" * 64), "at most 63"),
        (dry("--job.name", "a" * 62, "--sweep", "seed=1,2"), "at most 61"),
        (dry("--job.name", "a\n#SBATCH --wrap=id"), "without line breaks"),
        (dry("--slurm.partition", "a\n#SBATCH --wrap=id"), "job.platform.partition holds"),
        (dry("--job.nodes", "0"), "job.nodes is 0; it must be at least 1"),
        (dry("--job.max-restarts=-1"), "job.max_restarts is -1; it must be at least 0"),
        (dry("--job.chips-per-node", "8", "--job.processes-per-node", "3"), "8 does not divide over 3 processes"),
        (dry("--job.minutes", "2"), "job.minutes 2 leaves no time beside job.grace 120"),
        (dry("--job.environment", "1A=2"), "job.environment '1A=2' is not NAME=VALUE"),
        (dry("--job.environment", "A B=2"), "is not NAME=VALUE"),
        (dry("--slurm.options", "gpu; id"), "is no option of sbatch"),
        (dry("--slurm.cpus-per-process=-1"), "slurm.cpus_per_process is -1"),
        (dry("--job.nodes", "3", "--job.chips-per-node", "4", "mesh.fsdp=8"), "multiply to the 12 devices"),
        (
            dry("--job.nodes", "3", "--job.chips-per-node", "4", "--sweep", "mesh.fsdp=12,8"),
            "multiply to the 12 devices",
        ),
        (dry("--sweep", "seed"), "write it as key=value,value"),
        (dry("--sweep", "seed=1,,2"), "write it as key=value,value"),
        (dry("--sweep", "seed=1,1"), "has a value twice"),
        (dry("--sweep", "ema=0.5,0.50"), "makes the same run twice (ema=0.50)"),
        (dry("--sweep", "seed=1,2", "--sweep", "seed=3"), "--sweep seed is given twice"),
        (dry("--sweep", "run_dir=/a,/b"), "the runs of a sweep lie below --run-dir"),
        (dry("--sweep", f"seed={','.join(map(str, range(1001)))}"), "1001 runs, more than 1000"),
        (dry("--job.nodes", "2", backend="local"), "leave job.nodes at 1"),
        (dry("--job.minutes", "9", backend="local"), "has no time limit"),
        (dry(*JOBSET_FLAGS, "--job.processes-per-node", "2", backend="jobset"), "one process a pod"),
        (dry(*JOBSET_FLAGS, backend="jobset", run_dir="/elsewhere"), "does not lie below jobset.mount /srv"),
        (dry(*JOBSET_FLAGS, "--job.name", "a" * 50, backend="jobset"), "that is 5 shorter"),
        (dry(*JOBSET_FLAGS, "--jobset.topology", "4by4", backend="jobset"), "as 4x4 or 4x4x4"),
        (dry(*JOBSET_FLAGS, "--jobset.topology", "4x4", backend="jobset"), "needs its kind and the chips of a host"),
        (
            dry(
                *JOBSET_FLAGS,
                *("--jobset.topology", "4x4", "--job.accelerator", "tpu-v6e-slice", "--job.chips-per-node", "4"),
                backend="jobset",
            ),
            "has 16 chips, and 1 nodes of 4 have 4: give --job.nodes 4",
        ),
        (dry("--job.processes-per-node", "2", backend="ray"), "one process a node"),
        (dry("--ray.address", "http://10.0.0.1:8265", backend="ray"), "asks nobody who they are"),
        (dry("--ray.address", "http://127.0.0.1.evil.example:8265", backend="ray"), "asks nobody who they are"),
        (dry("--ray.address", "127.0.0.1:8265", backend="ray"), "is not http://HOST:PORT"),
        (dry("--ray.address", "http://127.0.0.1:99999", backend="ray"), "is not http://HOST:PORT"),
        (dry("--ray.address", "http://[::1", backend="ray"), "is not http://HOST:PORT"),
        (dry("--ray.cpus-per-node=-1", backend="ray"), "ray.cpus_per_node is -1"),
        (dry("steps=0"), "steps is 0; it must be at least 1"),
        (dry("--sweep", "data.batch_rows=8,0"), "data.batch_rows is 0; give 1 or more"),
        (dry("data.cache_bytes=-1"), "data.cache_bytes is -1; give 0 or more"),
        (dry("--job.minutes", "9", backend="ray"), "no time limit"),
        (dry(*GCLOUD_FLAGS, "--job.accelerator", "v5p-64", backend="gcloud"), "has 8 hosts: give --job.nodes 8"),
        (dry(*GCLOUD_FLAGS, "--job.accelerator", "v5p-8", backend="gcloud", run_dir="/a,b"), "takes a comma"),
    ],
    ids=lambda value: " ".join(map(str, value))[:60].replace("\n", " ") if isinstance(value, list) else "",
)
def test_what_cannot_run_is_refused(arguments: list[object], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert hint in error(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["quickstart_model"], "--backend is not given: choose one of local, slurm, jobset, ray, gcloud"),
        (["quickstart_model", "--backend"], "--backend is not given: choose one of local, slurm, jobset, ray, gcloud"),
        (["quickstart_model", "--backend", "slrum"], "no backend 'slrum'. Did you mean slurm?"),
        (["quickstart_model", "--backend=xyz"], "no backend 'xyz'. There are local, slurm"),
        (["--backend", "slurm"], "mmgpt launch PRESET|FOLDER --backend"),
        ([], "mmgpt launch PRESET|FOLDER --backend"),
        (["quickstart_model", "--backend", "slurm"], "--run-dir is not given: name an absolute folder"),
        (dry(backend="jobset"), "jobset.image is not given; `--backend jobset --help`"),
        (dry(backend="gcloud"), "gcloud.project is not given"),
        (dry(*GCLOUD_FLAGS, backend="gcloud"), "job.accelerator is not given"),
    ],
    ids=lambda value: " ".join(map(str, value))[:60] if isinstance(value, list) else "",
)
def test_what_is_missing_exits_with_2(arguments: list[object], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert hint in error(capsys, *arguments, code=2)


@pytest.mark.parametrize(
    ("typo", "right"),
    [
        ("--job.noodes=2", "--job.nodes"),
        ("--slurm.partitoin=x", "--slurm.partition"),
        ("--dry-rnu", "--dry-run"),
        ("optimizer.lerning_rate=1", "--optimizer.learning-rate"),
        ("--jobset.image=x", "--jobset.image"),
    ],
)
def test_a_typo_exits_with_2_and_the_right_key(typo: str, right: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*dry(typo)) == 2
    out, err = capsys.readouterr()
    assert right in out + err and "Traceback" not in out + err


def test_an_unknown_key_of_a_sweep_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    """As the same key on the command line, whose help is named."""
    for change in (["--sweep", "optimizer.lerning_rate=1,2"], ["optimizer.lerning_rate=1"]):
        assert call(*dry(*change)) == 2
        out, err = capsys.readouterr()
        assert "--optimizer.learning-rate" in out + err and "mmgpt launch quickstart_model --help" in out + err


@pytest.mark.parametrize("address", ["http://localhost:1", "http://127.0.0.9:1", "http://[::1]:1", "https://127.0.0.1"])
def test_ray_is_spoken_to_on_this_machine(address: str) -> None:
    asked = job(spec(PLATFORMS["ray"].replace(address=address)))
    assert f"--address={address}" in asked.spec.platform.commands(asked)[0]


def test_ray_elsewhere_is_spoken_to_when_told_so() -> None:
    far = PLATFORMS["ray"].replace(address="http://head:8265")
    with pytest.raises(LaunchError):
        job(spec(far))
    job(spec(far.replace(allow_remote=True)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_help_tells_the_keys_of_a_backend(backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("quickstart_model", "--backend", backend, "--help") == 0
    out = capsys.readouterr().out
    assert "--job.nodes" in out and "--sweep" in out and "--optimizer.learning-rate" in out
    assert f"--{backend}." in out or backend == "local"


FLAGS = {
    "jobset": JOBSET_FLAGS,
    "gcloud": (*GCLOUD_FLAGS, "--job.accelerator", "v5p-8"),
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dry_run_writes_to_stdout_alone(
    backend: str, empty: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    run_dir = empty / "runs" / "x"
    flags = [*FLAGS.get(backend, ()), *(("--jobset.mount", empty) if backend == "jobset" else ())]
    out, err = told(capfd, *dry(*flags, "seed=3", backend=backend, run_dir=run_dir))
    assert err == "" and f"==> {run_dir}/jobs/1/start.sh <==" in out and "\n$ " in out
    assert list(empty.iterdir()) == []


@pytest.mark.parametrize(
    ("backend", "install"), [("slurm", "slurm-client"), ("jobset", "kubectl"), ("ray", "mmgpt[ray]"), ("gcloud", "CLI")]
)
def test_a_missing_program_is_told_before_anything_is_written(
    backend: str, install: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    flags = [*FLAGS.get(backend, ()), *(("--jobset.mount", tmp_path) if backend == "jobset" else ())]
    said = error(capsys, "quickstart_model", "--backend", backend, "--run-dir", tmp_path / "x", *flags)
    assert BACKENDS[backend].program in said and install in said and not list(tmp_path.iterdir())


def test_a_program_beside_python_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script(tmp_path / "bin" / "ray", "exit 0")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("sys.executable", str(tmp_path / "bin" / "python"))
    flags = ["--backend", "ray", "--ray.address", "http://127.0.0.1:1", "--run-dir", tmp_path / "x"]
    assert "nothing answers at ray.address" in error(capsys, "quickstart_model", *flags)


# --- sweeps


def test_a_sweep_is_every_combination() -> None:
    assert combinations(()) == [()]
    assert combinations(("a.b=1,2", "c-d=(1,2),(3,4)")) == [
        ("a.b=1", "c_d=(1,2)"),
        ("a.b=1", "c_d=(3,4)"),
        ("a.b=2", "c_d=(1,2)"),
        ("a.b=2", "c_d=(3,4)"),
    ]


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for sbatch that takes everything; the real one is in test_slurm.py."""
    path = script(tmp_path / "bin" / "sbatch", f'[ $1 = --test-only ] || echo "$@" >> {tmp_path}/submitted')
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    return tmp_path / "submitted"


def test_a_sweep_writes_the_resolved_config_of_each_run(
    sbatch: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "runs"
    arguments = ["steps=700", "--sweep", "optimizer.learning_rate=1e-4,3e-4", "--sweep", "data.batch_rows=8,16"]
    out, _ = told(capfd, "quickstart_model", "--backend", "slurm", "--run-dir", run_dir, *arguments)
    preset = presets.preset("quickstart_model")
    assert isinstance(preset, Run)
    found = [config.load(run_dir / "jobs" / "1" / "tasks" / str(task) / "config.json") for task in range(4)]
    assert found == [
        preset.replace(
            steps=700,
            optimizer=preset.optimizer.replace(learning_rate=rate),
            data=preset.data.replace(batch_rows=rows),
        )
        for rate in (1e-4, 3e-4)
        for rows in (8, 16)
    ]
    assert sorted(path.name for path in run_dir.iterdir()) == ["0", "1", "2", "3", "jobs"]
    assert sbatch.read_text() == f"{run_dir}/jobs/1/job.sbatch\n"
    assert "optimizer.learning_rate=3e-4 data.batch_rows=16" in out
    saved = config.load(run_dir / "jobs" / "1" / "job.json")
    assert isinstance(saved, JobSpec)
    assert saved.preset == "quickstart_model" and saved.overrides == ("steps=700",) and len(saved.sweep) == 2


# --- a submission on the disk


def test_a_second_submission_leaves_the_first_as_it_is(sbatch: Path, tmp_path: Path) -> None:
    arguments = ["quickstart_model", "--backend", "slurm", "--run-dir", tmp_path / HOSTILE]
    assert call(*arguments) == 0
    jobs = tmp_path / HOSTILE / "jobs"
    first = {path: path.read_bytes() for path in (jobs / "1").rglob("*") if path.is_file()}
    assert call(*arguments, "--job.minutes", "9") == 0
    assert sorted(path.name for path in jobs.iterdir()) == ["1", "2"]
    assert {path: path.read_bytes() for path in (jobs / "1").rglob("*") if path.is_file()} == first
    assert "--time=9" in (jobs / "2" / "job.sbatch").read_text()


def test_a_folder_that_holds_another_run_is_refused(
    sbatch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, run = prepared(tmp_path)
    there = tmp_path / "run"
    there.mkdir()
    (there / "config.json").write_text(config.to_json(run))
    (there / "metrics.jsonl").write_text("begun\n")
    arguments = [base, "--backend", "slurm", "--run-dir", there]
    said = error(capsys, *arguments, "seed=9")
    assert "holds a run of another config" in said and "seed: 0 there, 9 asked" in said
    assert not (there / "jobs").exists() and not sbatch.exists()
    assert call(*arguments, "steps=99") == 0  # more steps may be asked of a run that goes on


def test_a_config_of_a_submission_that_is_cut_short_is_named(
    sbatch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("quickstart_model", "--backend", "slurm", "--run-dir", tmp_path / "x") == 0
    folder = tmp_path / "x" / "jobs" / "1"
    for name in ("tasks/0/config.json", "job.json"):
        (folder / name).write_text((folder / name).read_text()[:40])
    done = subprocess.run(["bash", str(folder / "start.sh"), "0"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {folder}/tasks/0/config.json: not JSON")
    pytest.importorskip("ray", reason="the driver of a Ray job: pip install mmgpt[ray]")
    driver = importlib.import_module("mmgpt.launch.ray_driver")
    capsys.readouterr()
    assert driver.main(str(folder), "0") == 1
    assert capsys.readouterr().err.startswith(f"error: {folder}/job.json: not JSON")


def test_a_scheduler_that_refuses_is_heard(sbatch: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script(tmp_path / "bin" / "sbatch", "echo sbatch: error: invalid partition >&2; exit 3")
    _, err = told(capfd, "quickstart_model", "--backend", "slurm", "--run-dir", tmp_path / "x", code=1)
    assert "invalid partition" in err and "exit code 3" in err and "job.sbatch" in err


def test_a_full_disk_leaves_no_half_submission(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with small_disk(tmp_path / "disk", "900k") as disk:
        said = error(capsys, "quickstart_model", "--backend", "local", "--run-dir", disk / "run")
        assert "the disk is full; free some space" in said
        assert list((disk / "run").rglob("*")) == [disk / "run" / "jobs"]


def test_a_launch_that_is_killed_in_the_middle_harms_no_later_one(sbatch: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = ["quickstart_model", "--backend", "slurm", "--run-dir", run_dir]
    script(tmp_path / "slow" / "git", f"touch {tmp_path}/asked; exec sleep 60")  # it lists the files of the snapshot
    environment = os.environ | {"PATH": f"{tmp_path}/slow:{os.environ['PATH']}"}
    with subprocess.Popen(
        command(*arguments), env=environment, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        while not (tmp_path / "asked").exists():
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    assert (run_dir / "jobs" / "1").exists() and not sbatch.exists()
    assert call(*arguments) == 0
    assert (run_dir / "jobs" / "2" / "job.sbatch").exists()
    assert sbatch.read_text() == f"{run_dir}/jobs/2/job.sbatch\n"


@pytest.mark.slow
def test_launches_at_the_same_time_get_folders_of_their_own(sbatch: Path, tmp_path: Path) -> None:
    line = command("quickstart_model", "--backend", "slurm", "--run-dir", tmp_path / "run")
    launches = [subprocess.Popen(line, stderr=subprocess.DEVNULL) for _ in range(4)]
    assert [process.wait() for process in launches] == [0] * 4
    submitted = sbatch.read_text().splitlines()
    assert sorted(submitted) == [f"{tmp_path}/run/jobs/{number}/job.sbatch" for number in range(1, 5)]


def test_ray_that_is_not_there_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(script(tmp_path / "bin" / "ray", "exit 1").parent))
    with socket.socket() as probe:  # bound, and nobody listens
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
        arguments = ["quickstart_model", "--backend", "ray", "--run-dir", tmp_path / "x", "--ray.address", address]
        said = error(capsys, *arguments)
    assert f"nothing answers at ray.address {address}" in said and "ray start --head" in said
    assert not (tmp_path / "x").exists()


def test_the_script_of_the_checkout_is_the_same_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = dry(run_dir=tmp_path)
    out, _ = told(capfd, *arguments)
    assert subprocess.run(command(*arguments), capture_output=True, text=True, check=True).stdout == out != ""


def test_names_of_pods_fit() -> None:
    """The longest name that is taken makes a last pod's name, with what Kubernetes adds, of exactly 63 characters."""
    asked = spec(JOBSET, nodes=100)
    longest = next(n for n in range(63, 0, -1) if _taken(asked.replace(name="a" * n)))
    assert longest + len("-workers-0-99") + len("-xxxxx") == 63


def _taken(asked: JobSpec) -> bool:
    try:
        asked.check()
    except LaunchError:
        return False
    return True
