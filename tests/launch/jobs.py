"""Jobs as the tests of every backend use them, and ways to launch one."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from mmgpt.launch.gcloud import Gcloud
from mmgpt.launch.jobset import JobSet
from mmgpt.launch.local import Local
from mmgpt.launch.ray_jobs import Ray
from mmgpt.launch.slurm import Slurm
from mmgpt.launch.spec import Job, JobSpec, Platform

from mmgpt.core import config
from mmgpt.train.run import Run
from tests import tiny

ROOT = Path(__file__).parents[2]
HOSTILE = 'it\'s $HOME `id` $(id) "q" ;& >x # ü'
"""A name that a shell would take apart, run, or end early."""

JOBSET = JobSet(image="registry.example/mmgpt:1", claim="runs", mount="/srv/runs")
GCLOUD = Gcloud(project="lab", zone="us-east5-a", runtime_version="v2-alpha-tpuv5", boot=("mount nfs:/runs /srv/runs",))
PLATFORMS: dict[str, Platform] = {
    "local": Local(),
    "slurm": Slurm(),
    "jobset": JOBSET,
    "ray": Ray(),
    "gcloud": GCLOUD,
}


def spec(platform: Platform, **changes: Any) -> JobSpec:
    """A specification that its backend takes."""
    base = JobSpec(
        name="emu3-8b",
        preset="emu3_8b",
        run_dir="/srv/runs/emu3",
        platform=platform,
        python="/srv/venv/bin/python",
        workdir="/srv/data",
        accelerator="v5p-8" if isinstance(platform, Gcloud) else "",
    )
    return base.replace(**changes)


def job(asked: JobSpec, tasks: int = 1) -> Job:
    """The first submission of a specification."""
    run_dir = Path(asked.run_dir)
    asked.check(tasks)
    return Job(
        asked, run_dir / "jobs" / "1", tuple(run_dir / str(i) for i in range(tasks)) if asked.sweep else (run_dir,)
    )


def prepared(folder: Path, **changes: Any) -> tuple[Path, Run]:
    """A folder that holds the config of a small run, and the run; its data lie beside."""
    (folder / "base").mkdir(parents=True)
    (folder / "data").mkdir()
    run = tiny.run(folder / "data", **changes)
    (folder / "base" / "config.json").write_text(config.to_json(run))
    return folder / "base", run


def command(*arguments: object) -> list[str]:
    """The command line of a launch from the checkout."""
    return [sys.executable, str(ROOT / "launch" / "submit.py"), *map(str, arguments)]


def launched(*arguments: object, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Launches and waits for the command's end, which must be `code`."""
    told = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    done = subprocess.run(command(*arguments), capture_output=True, text=True, check=False, env=told)
    assert done.returncode == code, done.stderr[-3000:] + done.stdout[-3000:]
    return done


def script(path: Path, text: str) -> Path:
    """A program in bash, as a stand-in for an interpreter or a scheduler's command."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return path
