"""Renders a Ray job for each task and submits it with `ray job submit`, which follows it until it ends.

The job's driver is this module, run from the submission's code: it takes a place on as many machines as the job has
nodes, starts a process on each, and starts them again when they exit with 75 or, a bounded number of times, fail.
Ray's job interface runs any code for whoever reaches it, so only one on this machine is spoken to.
"""

import ipaddress
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mmgpt.core import config
from mmgpt.core.log import console

from .process import ended, until_done
from .spec import Job, JobSpec, LaunchError, Platform


class Ray(Platform):
    """Options of Ray."""

    program = "ray"
    comes_with = "pip install 'mmgpt[ray]'"

    address: str = "http://127.0.0.1:8265"
    """Of the job interface; for a distant cluster forward its port to this machine, as with ssh -L."""
    allow_remote: bool = False
    """Whether the interface may be of another machine: whoever reaches it can run any code on the cluster."""
    cpus_per_node: float = 1.0
    """CPUs, as Ray counts them, that each process takes."""
    resource: str = "GPU"
    """Ray's name of the chips: GPU or TPU."""

    def check(self, spec: JobSpec, tasks: int) -> None:
        parts = urlsplit(self.address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise LaunchError(f"ray.address {self.address!r} is not http://HOST:PORT.")
        if not self.allow_remote and not _is_here(parts.hostname):
            raise LaunchError(
                f"ray.address {self.address} is of another machine. Ray's job interface asks nobody who they are, so "
                "forward its port to this one (ssh -L 8265:127.0.0.1:8265 HEAD), or give --ray.allow-remote True."
            )
        if spec.processes_per_node != 1:
            raise LaunchError("Ray starts one process a node: leave job.processes_per_node at 1 and give more nodes.")
        if spec.minutes:
            raise LaunchError("a Ray job has no time limit: leave job.minutes at 0.")

    def render(self, job: Job) -> dict[str, str]:
        return {}

    def commands(self, job: Job) -> list[list[str]]:
        return [
            [
                *["ray", "job", "submit", f"--address={self.address}"],
                f"--submission-id={job.name(task)}-{job.folder.name}",
                *(["--no-wait"] if job.spec.sweep else []),
                *["--", "env", f"PYTHONPATH={job.folder / 'code'}", "PYTHONSAFEPATH=1"],
                *[job.spec.python, "-m", __name__, str(job.folder), str(task)],
            ]
            for task in range(len(job.run_dirs))
        ]


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Host:
    """An actor: the machine that its placement group gave it, and the process there."""

    def address(self) -> str:
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def start(self, command: list[str], told: dict[str, str]) -> None:
        self._process = subprocess.Popen(command, env=os.environ | told, stdin=subprocess.DEVNULL)

    def poll(self) -> int | None:
        return self._process.poll()


class _Remote:
    """A process on another machine, as its driver sees it."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def poll(self) -> int | None:
        import ray
        from ray.exceptions import RayActorError

        try:
            return ray.get(self._actor.poll.remote())
        except RayActorError as e:
            console.print(f"a machine is lost: {e}", style="bold red")
            return 1

    def kill(self) -> None:
        import ray

        ray.kill(self._actor)


def drive(folder: Path, task: int) -> int:
    """Runs one task on the Ray cluster that this process belongs to, and returns its exit code."""
    import ray

    spec: JobSpec = config.load(folder / "job.json")
    ray.init(address="auto")
    return until_done(lambda: _once(spec, folder, task), spec.max_restarts)


def _once(spec: JobSpec, folder: Path, task: int) -> int:
    import ray
    from ray.exceptions import RayActorError
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    platform = spec.platform
    assert isinstance(platform, Ray)
    share = {"CPU": platform.cpus_per_node}
    chips = {platform.resource: float(spec.chips_per_node)} if spec.chips_per_node else {}
    group = placement_group([share | chips] * spec.nodes, strategy="STRICT_SPREAD")
    try:
        while not group.wait(60):
            there = sum(node["Alive"] for node in ray.nodes())
            console.print(f"waiting for {spec.nodes} machines with {share | chips} free; {there} are there")
        gpus = chips.pop("GPU", 0.0)
        actors = [
            ray.remote(_Host)
            .options(
                num_cpus=platform.cpus_per_node,
                num_gpus=gpus,
                resources=chips,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number),
            )
            .remote()
            for number in range(spec.nodes)
        ]
        address = ray.get(actors[0].address.remote())
        # The process ends with the actor that started it, whatever ends that.
        command = ["setpriv", "--pdeathsig", "KILL", "bash", str(folder / "start.sh"), str(task)]
        for number, actor in enumerate(actors):
            numbers = {"JAX_NUM_PROCESSES": str(spec.nodes), "JAX_PROCESS_ID": str(number)}
            ray.get(actor.start.remote(command, numbers | {"JAX_COORDINATOR_ADDRESS": address}))
        return ended([_Remote(actor) for actor in actors], spec.grace)
    except RayActorError as e:
        console.print(f"a machine was lost before the run began: {e}", style="bold red")
        return 1
    finally:
        remove_placement_group(group)


if __name__ == "__main__":
    sys.exit(drive(Path(sys.argv[1]), int(sys.argv[2])))
