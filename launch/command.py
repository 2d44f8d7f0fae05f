"""The command `mmgpt launch`: submits a training job to this machine or a cluster.

A submission is a folder, `jobs/N` in the run folder: the code as it is now, the resolved config of each task, and the
backend's script. The job runs these, whatever is edited later.
"""

import dataclasses
import difflib
import itertools
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.table import Table

from mmgpt.cli import FLAGS, check_run, overridden
from mmgpt.core import config
from mmgpt.core.config import Config, as_flags
from mmgpt.core.errors import UsageError
from mmgpt.core.log import console, printable, show, write_atomic
from mmgpt.data_commands import preset_or_run

from .gcloud import Gcloud
from .jobset import JobSet
from .local import Local
from .process import start_script
from .ray_jobs import Ray
from .slurm import Slurm
from .snapshot import snapshot
from .spec import Job, JobSpec, LaunchError, Platform
from .sweep import combinations

if TYPE_CHECKING:
    from mmgpt.train.run import Run

BACKENDS: dict[str, type[Platform]] = {"local": Local, "slurm": Slurm, "jobset": JobSet, "ray": Ray, "gcloud": Gcloud}
FREE_TEXT = ("--sweep", "--job.environment", "--job.setup", "--slurm.options", "--gcloud.boot")
"""Options whose value may look like another argument."""
NOT_SHARED = ("tmpfs", "ramfs", "devtmpfs", "proc", "sysfs")
"""File systems that no other machine can see."""


def launch(args: list[str]) -> int:
    """Submits what the arguments say and returns an exit code."""
    usage = (
        "mmgpt launch PRESET|FOLDER --backend {" + ",".join(BACKENDS) + "} --run-dir FOLDER [--dry-run] "
        "[--sweep key=value,value] [--job.KEY value ...] [--BACKEND.KEY value ...] [--KEY value ... of the config]"
    )
    if args and args[0] in ("-h", "--help"):
        sys.stdout.write(f"usage: {usage}   (`mmgpt launch PRESET --backend NAME --help` tells all keys)\n")
        return 0
    if not args or args[0].startswith("-"):
        raise UsageError(f"{usage}.")
    options = _parse(args[0], args[1:])
    runs = _runs(options)
    job = _job(options.spec, len(runs))
    if options.dry_run:
        sys.stdout.write(shown(job))
        return 0
    return _submit(job, runs)


@dataclasses.dataclass(frozen=True)
class _Asked:
    """What the command line asks for."""

    spec: JobSpec
    run: "Run"
    dry_run: bool


def _parse(name: str, args: list[str]) -> _Asked:
    base, folder = preset_or_run(name)
    check_run(base, name)
    args = _joined(args)
    chosen = "local" if {"-h", "--help"} & {*args} and not any("backend" in arg for arg in args) else _backend(args)
    job, of_backend = JobSpec(), BACKENDS[chosen]()

    @dataclasses.dataclass(frozen=True)
    class Options:
        config: Annotated[Config, *FLAGS, tyro.conf.arg(name="")] = base
        spec: Annotated[JobSpec, *FLAGS, tyro.conf.arg(name="job")] = job
        platform: Annotated[Platform, *FLAGS, tyro.conf.arg(name=chosen)] = of_backend
        backend: Annotated[str, tyro.conf.arg(help_behavior_hint="(required)")] = chosen
        """local, slurm, jobset, ray or gcloud."""
        run_dir: str = str(folder.resolve()) if folder else ""
        """Absolute folder of the run, or of a sweep's runs, that all machines see."""
        sweep: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
        """key=value,value: a run for each. Given several times, a run for each combination."""
        dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
        """Print what would be submitted, and write nothing."""

    asked = tyro.cli(
        Options,
        args=as_flags(args),
        prog=f"mmgpt launch {name}",
        config=(tyro.conf.AvoidSubcommands, tyro.conf.SuppressFixed),
    )
    changed = config.difference(asked.config, base)
    job = asked.spec
    spec = job.replace(
        name=job.name or (folder.resolve().name if folder else name).replace("_", "-").lower(),
        preset=name,
        overrides=tuple(f"{key}={new}" for key, (_, new) in changed.items()),
        sweep=asked.sweep,
        run_dir=asked.run_dir.rstrip("/"),
        platform=asked.platform,
        python=job.python or (sys.executable if asked.platform.shares_machine else "python3"),
        workdir=job.workdir or (str(Path.cwd()) if asked.platform.shares_machine else asked.run_dir),
    )
    run: Any = asked.config
    return _Asked(spec, run, asked.dry_run)


def _joined(args: list[str]) -> list[str]:
    """`--sweep key=1,2` as the one argument `--sweep=key=1,2`: its value is no change of the config."""
    joined: list[str] = []
    for arg in args:
        if joined and joined[-1] in FREE_TEXT:
            joined[-1] += f"={arg}"
        else:
            joined.append(arg)
    return joined


def _backend(args: list[str]) -> str:
    """The backend that is asked for, known before all else since its options are among the arguments."""
    said = [value for flag, value in itertools.pairwise(args) if flag == "--backend"]
    said += [arg.partition("=")[2] for arg in args if arg.startswith(("--backend=", "backend="))]
    if not said:
        raise UsageError(f"--backend is not given: choose one of {', '.join(BACKENDS)}.")
    if said[-1] not in BACKENDS:
        near = difflib.get_close_matches(said[-1], BACKENDS, 1)
        hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(BACKENDS)}."
        raise UsageError(f"no backend {said[-1]!r}. {hint}")
    return said[-1]


def _runs(asked: _Asked) -> "list[Run]":
    """The config of each task, checked against the machines that the job asks for."""
    from mmgpt.train.run import check

    runs = []
    for changes in combinations(asked.spec.sweep):
        run, run_dir = overridden(asked.run, list(changes), f"mmgpt launch {asked.spec.preset}")
        if run_dir is not None:
            raise LaunchError("--sweep run_dir: the runs of a sweep lie below --run-dir, numbered.")
        check(run)
        if run in runs:
            raise LaunchError(
                f"the sweep makes the same run twice ({', '.join(changes)}): leave one of the values out."
            )
        runs.append(run)
    asked.spec.check(len(runs))
    chips = asked.spec.platform.chips(asked.spec)
    for run in runs:
        if chips is not None:
            run.mesh.sizes(chips)
    return runs


def _job(spec: JobSpec, tasks: int) -> Job:
    """The job with the folder that it would get now."""
    run_dir = Path(spec.run_dir)
    if not isinstance(spec.platform, Local):
        _check_shared(run_dir)
    numbers = [int(path.name) for path in run_dir.glob("jobs/*") if path.name.isdecimal()]
    folder = run_dir / "jobs" / str(max(numbers, default=0) + 1)
    return Job(spec, folder, tuple(run_dir / str(task) for task in range(tasks)) if spec.sweep else (run_dir,))


def _check_shared(folder: Path) -> None:
    """LaunchError where the folder lies in this machine's memory; that a disk is shared is seen on the machines."""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return
    kinds = {}
    for line in mounts.read_text().splitlines():
        _, place, kind, *_ = line.split(" ")
        kinds[Path(place)] = kind  # a later mount hides an earlier one
    place = next((path for path in (folder.resolve(), *folder.resolve().parents) if path in kinds), Path("/"))
    if kinds.get(place) in NOT_SHARED:
        raise LaunchError(
            f"--run-dir {folder} lies on {kinds[place]} ({place}), which no other machine sees: give a folder on "
            "storage that all machines of the job share."
        )


def shown(job: Job) -> str:
    """The files and command lines of a submission, and the run folder and changes of each task."""
    parts = [f"==> {job.folder / name} <==\n{text}" for name, text in _files(job).items()]
    tasks = zip(job.run_dirs, combinations(job.spec.sweep), strict=True)
    parts.append("".join(f"{' '.join([str(run_dir), *changes])}\n" for run_dir, changes in tasks))
    parts.append("".join(f"$ {shlex.join(command)}\n" for command in job.spec.platform.commands(job)))
    return "\n".join(parts)


def _files(job: Job) -> dict[str, str]:
    return {"start.sh": start_script(job), **job.spec.platform.render(job)}


def _submit(job: Job, runs: "list[Run]") -> int:
    from mmgpt.train.run import goes_on

    job.spec.platform.ready()
    for run, run_dir in zip(runs, job.run_dirs, strict=True):
        goes_on(run, run_dir)
    while True:
        try:
            job.folder.mkdir(parents=True)
            break
        except FileExistsError:  # another launch took the number
            job = _job(job.spec, len(runs))
    try:
        _write(job, runs)
    except BaseException:
        shutil.rmtree(job.folder, ignore_errors=True)
        raise
    _tell(job)
    return job.spec.platform.submit(job)


def _write(job: Job, runs: "list[Run]") -> None:
    """Fills the folder of a submission, which nothing changes afterwards but the logs."""
    snapshot(job.folder)
    for task, (run, run_dir) in enumerate(zip(runs, job.run_dirs, strict=True)):
        write_atomic(job.folder / "tasks" / str(task) / "config.json", config.to_json(run))
        run_dir.mkdir(exist_ok=True)
        for name in ("commit.txt", "diff.patch"):
            if (job.folder / name).exists() and not (run_dir / name).exists():
                shutil.copy(job.folder / name, run_dir / name)
    write_atomic(job.folder / "job.json", config.to_json(job.spec))
    for name, text in _files(job).items():
        write_atomic(job.folder / name, text)
    (job.folder / "logs").mkdir()


def _tell(job: Job) -> None:
    spec = job.spec
    for change in spec.overrides:
        console.print(f"  {printable(change)}")
    if spec.sweep:
        table = Table("task", "run folder", "changes", title=spec.name)
        for task, changes in enumerate(combinations(spec.sweep)):
            table.add_row(str(task), str(job.run_dirs[task]), printable(" ".join(changes)))
        show(table)
    console.print(f"{spec.name} ({spec.preset}): code, config and scripts of this submission are in {job.folder}")
