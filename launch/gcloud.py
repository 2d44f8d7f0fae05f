"""Renders `startup-TASK.sh`, which every host of a TPU slice runs when it boots, and asks for the slice with `gcloud`.

The slice comes as a queued resource. The script starts the process again when it exits with 75, and after other
failures a bounded number of times. Cloud TPU tells the hosts of each other. A slice that is taken away (spot) does not
come back by itself: delete the queued resource and submit the run folder again, which goes on.
"""

import dataclasses

import tyro

from mmgpt.core.errors import UsageError

from .process import loop_script, quote
from .spec import Job, JobSpec, LaunchError, Platform


@dataclasses.dataclass(frozen=True)
class Generation:
    """What the number of an accelerator type counts, and how chips lie on hosts."""

    cores_per_chip: int
    single_host: int
    """Chips of the largest slice that is one host; the hosts of larger ones have four."""


# https://cloud.google.com/tpu/docs/v4, v5p, v5e, v6e: v4 and v5p types count cores, the others chips.
GENERATIONS = {
    "v4": Generation(2, 4),
    "v5p": Generation(2, 4),
    "v5litepod": Generation(1, 8),
    "v6e": Generation(1, 8),
}


class Gcloud(Platform):
    """Options of Cloud TPU's queued resources."""

    shares_machine = False
    program = "gcloud"
    comes_with = "the Google Cloud CLI, and log in with `gcloud auth login`"

    project: str = ""
    zone: str = ""
    runtime_version: str = ""
    """The hosts' software, as v2-alpha-tpuv5."""
    spot: bool = False
    """Whether the slice may be taken away at any time, for a lower price."""
    network: str = ""
    subnetwork: str = ""
    boot: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A line of shell on each host when it boots, as the one that mounts the shared storage. May be given several
    times."""

    def check(self, spec: JobSpec, tasks: int) -> None:
        for name in ("project", "zone", "runtime_version"):
            if not vars(self)[name]:
                raise UsageError(f"gcloud.{name} is not given; a queued resource needs it.")
        if not spec.accelerator:
            raise UsageError("job.accelerator is not given: name the type of the slice, as v5p-16.")
        if spec.processes_per_node != 1 or spec.chips_per_node:
            raise LaunchError(
                "a TPU slice has one process a host, and its type says how many chips: leave job.processes_per_node "
                "and job.chips_per_node as they are."
            )
        if spec.minutes:
            raise LaunchError("a queued resource has no time limit here: leave job.minutes at 0.")
        if "," in spec.run_dir:
            raise LaunchError(f"{spec.run_dir}: gcloud takes a comma for the end of a path; give another run folder.")
        size = self._size(spec)
        if size is not None and size[1] != spec.nodes:
            raise LaunchError(f"a {spec.accelerator} slice has {size[1]} hosts: give --job.nodes {size[1]}.")

    def _size(self, spec: JobSpec) -> tuple[int, int] | None:
        """Chips and hosts of the slice, where its type is known."""
        kind, _, number = spec.accelerator.partition("-")
        if kind not in GENERATIONS or not number.isdecimal():
            return None
        generation = GENERATIONS[kind]
        chips = int(number) // generation.cores_per_chip
        return chips, 1 if chips <= generation.single_host else chips // 4

    def chips(self, spec: JobSpec) -> int | None:
        size = self._size(spec)
        return None if size is None else size[0]

    def render(self, job: Job) -> dict[str, str]:
        return {f"startup-{task}.sh": self._startup(job, task) for task in range(len(job.run_dirs))}

    def _startup(self, job: Job, task: int) -> str:
        lines = [
            "#!/bin/bash",
            f"# Each host of {job.name(task)} runs this when it boots.",
            *self.boot,
            f"job={quote(job.folder)}",
            f'exec >>"$job/logs/{job.name(task)}-$(hostname).log" 2>&1 </dev/null',
            *loop_script(f'bash "$job/start.sh" {task}', "continue", job.spec.max_restarts),
        ]
        return "\n".join(lines) + "\n"

    def commands(self, job: Job) -> list[list[str]]:
        named = {"network": self.network, "subnetwork": self.subnetwork}
        return [
            [
                *["gcloud", "compute", "tpus", "queued-resources", "create", job.name(task)],
                f"--node-id={job.name(task)}",
                f"--project={self.project}",
                f"--zone={self.zone}",
                f"--accelerator-type={job.spec.accelerator}",
                f"--runtime-version={self.runtime_version}",
                *(f"--{name}={value}" for name, value in named.items() if value),
                *(["--spot"] if self.spot else []),
                f"--metadata-from-file=startup-script={job.folder}/startup-{task}.sh",
            ]
            for task in range(len(job.run_dirs))
        ]
