"""The specification of a job, which every backend renders from, and a job made ready in its folder."""

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import tyro

from mmgpt.core.config import Config, leaves
from mmgpt.core.errors import UsageError, UserError
from mmgpt.train.checkpoint import check_path

LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
"""A DNS label (RFC 1035): what Kubernetes and Google Cloud take as a name."""
LABEL_LENGTH = 63


class LaunchError(UserError):
    """A job that cannot be submitted; the message says why and what to do."""


class Platform(Config):
    """Where a job runs. A backend subclasses it with what only that backend knows."""

    shares_machine: ClassVar[bool] = True
    """Whether the processes see the submitter's folders and Python, as on a cluster with a shared file system."""
    program: ClassVar[str] = ""
    """The program that submits."""
    comes_with: ClassVar[str] = ""
    """What to install where the program is missing."""

    tells: ClassVar[tuple[str, ...]] = ()
    """Lines of shell in each process that give its number, where the platform has another name for it."""

    def check(self, spec: "JobSpec", tasks: int) -> None:
        """LaunchError where this backend cannot run such a job; `tasks` is the number of runs in it."""

    def chips(self, spec: "JobSpec") -> int | None:
        """Devices that JAX will find in the whole job, where that is known."""
        return spec.nodes * spec.chips_per_node or None

    def render(self, job: "Job") -> dict[str, str]:
        """The files of a submission by name: a pure function of the job."""
        raise NotImplementedError

    def commands(self, job: "Job") -> list[list[str]]:
        """The command lines of a submission, as argument lists."""
        raise NotImplementedError

    def ready(self) -> None:
        """LaunchError where nothing can be submitted from this machine."""
        if shutil.which(self.program, path=_search_path()) is None:
            raise LaunchError(f"there is no {self.program} on this machine: install {self.comes_with}.")

    def submit(self, job: "Job") -> int:
        """Hands a job over whose files are written, and returns an exit code."""
        for command in self.commands(job):
            done = subprocess.run(command, check=False, env=os.environ | {"PATH": _search_path()})
            if done.returncode != 0:
                raise LaunchError(
                    f"this ended with exit code {done.returncode}; what it said stands above:\n  {shlex.join(command)}"
                )
        return 0


class JobSpec(Config):
    """What is run and on what; the options of one backend are in `platform`."""

    name: str = ""
    """A DNS label; by default the preset's name."""
    preset: tyro.conf.Fixed[str] = ""
    overrides: tyro.conf.Fixed[tuple[str, ...]] = ()
    sweep: tyro.conf.Fixed[tuple[str, ...]] = ()
    run_dir: tyro.conf.Fixed[str] = ""
    platform: tyro.conf.Fixed[Platform] = Platform()
    nodes: int = 1
    """Machines: nodes of Slurm and Ray, pods of a JobSet, hosts of a TPU slice."""
    processes_per_node: int = 1
    """Processes on each; JAX needs one a machine, whatever number of chips it has."""
    chips_per_node: int = 0
    """Accelerators of each machine; 0 asks for none."""
    accelerator: str = ""
    """Their kind, in the backend's words: h100 (Slurm), nvidia-h100-80gb or tpu-v5p-slice (JobSet), v5p-16 (gcloud)."""
    minutes: int = 0
    """Time limit after which the run saves and is queued again; 0 leaves it to the platform."""
    grace: int = 120
    """Seconds between SIGTERM and the end of the machines, in which the run saves."""
    max_restarts: int = 3
    """How often a process that failed is started again; being preempted does not count."""
    python: str = ""
    """Interpreter of the processes, as in a virtual environment; by default this one, or an image's python3."""
    workdir: str = ""
    """Folder from which relative paths of data are taken; by default this one, or the run folder in an image."""
    setup: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A line of shell before each process, as 'module load cuda'. May be given several times."""
    environment: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=VALUE for each process. May be given several times."""

    def check(self, tasks: int = 1) -> None:
        """LaunchError or ConfigError where no backend could run this, or its own cannot."""
        for key, value in leaves(self).items():
            for text in value if isinstance(value, tuple) else (value,):
                if isinstance(text, str) and not text.isprintable():
                    raise LaunchError(f"job.{key} holds {text!r}: give it without line breaks and control characters.")
        longest = self.name if tasks == 1 else f"{self.name}-{tasks - 1}"
        if not LABEL.fullmatch(self.name) or len(longest) > LABEL_LENGTH:
            raise LaunchError(
                f"job.name {self.name!r} is no DNS label: give --job.name lower-case letters, digits and '-', a letter "
                f"first, at most {LABEL_LENGTH - len(longest) + len(self.name)} of them."
            )
        for key in ("nodes", "processes_per_node", "grace"):
            if vars(self)[key] < 1:
                raise LaunchError(f"job.{key} is {vars(self)[key]}; it must be at least 1.")
        for key in ("chips_per_node", "minutes", "max_restarts"):
            if vars(self)[key] < 0:
                raise LaunchError(f"job.{key} is {vars(self)[key]}; it must be at least 0.")
        if self.chips_per_node % self.processes_per_node:
            raise LaunchError(
                f"job.chips_per_node {self.chips_per_node} does not divide over {self.processes_per_node} processes a "
                "node; change one of them."
            )
        if 0 < self.minutes * 60 <= self.grace:
            raise LaunchError(f"job.minutes {self.minutes} leaves no time beside job.grace {self.grace} (seconds).")
        for pair in self.environment:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*=.*", pair):
                raise LaunchError(f"job.environment {pair!r} is not NAME=VALUE.")
        self._check_folders()
        self.platform.check(self, tasks)

    def _check_folders(self) -> None:
        folder = Path(self.run_dir)
        if not self.run_dir:
            raise UsageError("--run-dir is not given: name an absolute folder that all machines of the job see.")
        if not folder.is_absolute() or ".." in folder.parts:
            raise LaunchError(
                f"--run-dir {self.run_dir}: give the absolute path of a folder that all machines of "
                "the job see under the same name."
            )
        for file in filter(Path.is_file, (folder, *folder.parents)):
            raise LaunchError(f"--run-dir {self.run_dir}: {file} is a file; name a folder.")
        if not Path(self.workdir).is_absolute():
            raise LaunchError(f"job.workdir {self.workdir}: give an absolute path.")
        check_path(folder)


@dataclasses.dataclass(frozen=True)
class Job:
    """A submission: its folder, which holds code, configs and scripts, and the run folder of each of its tasks.

    There is one task, or one for each combination of a sweep.
    """

    spec: JobSpec
    folder: Path
    run_dirs: tuple[Path, ...]

    def name(self, task: int) -> str:
        """The name of one task, where each is submitted on its own."""
        return self.spec.name if len(self.run_dirs) == 1 else f"{self.spec.name}-{task}"


def _search_path() -> str:
    """Where programs are looked for: PATH, then beside this Python, where pip puts them; PATH may lack that folder."""
    return os.pathsep.join((os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)))
