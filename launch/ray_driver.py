"""Runs one task of a job on the Ray cluster that it was submitted to: `python -m mmgpt.launch.ray_driver JOB TASK`.

It takes a place on as many machines as the job has nodes and starts a process on each. When they have been preempted
(75) it takes places anew, and so it does, a bounded number of times, when one failed or its machine was lost.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from mmgpt.core import config
from mmgpt.core.errors import UserError
from mmgpt.core.log import console

from .process import ended, until_done
from .ray_jobs import Ray
from .spec import JobSpec

WAIT_SECONDS = 60
"""Time between lines that say what is waited for."""
LOST = 1
"""Exit code of a process whose machine is gone."""


class Host:
    """An actor: a place on a machine, and the process there."""

    def address(self) -> str:
        """Where the other processes may meet the one here."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def start(self, command: list[str], told: dict[str, str]) -> None:
        self._process = subprocess.Popen(command, env=os.environ | told, stdin=subprocess.DEVNULL)

    def poll(self) -> int | None:
        return self._process.poll()


class Remote:
    """The process of an actor, as the driver sees it."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def poll(self) -> int | None:
        try:
            return ray.get(self._actor.poll.remote())
        except RayActorError as e:
            console.print(f"a machine was lost: {e}", style="bold red")
            return LOST

    def kill(self) -> None:
        ray.kill(self._actor)


def drive(folder: Path, task: int) -> int:
    """Runs a task to its end and returns its exit code."""
    spec: JobSpec = config.load(folder / "job.json")
    platform = spec.platform
    assert isinstance(platform, Ray)
    place = {"CPU": platform.cpus_per_node}
    if spec.chips_per_node:
        place[platform.resource] = float(spec.chips_per_node)
    ray.init(address="auto")

    def once() -> int:
        group = placement_group([place] * spec.nodes, strategy="STRICT_SPREAD")
        try:
            while not group.wait(WAIT_SECONDS):
                there = sum(node["Alive"] for node in ray.nodes())
                console.print(f"waiting for {spec.nodes} machines with {place} free; {there} machines are there")
            return _run(spec, place, group, ["bash", str(folder / "start.sh"), str(task)])
        except RayActorError as e:
            console.print(f"a machine was lost before the run began: {e}", style="bold red")
            return LOST
        finally:
            remove_placement_group(group)

    return until_done(once, spec.max_restarts)


def _run(spec: JobSpec, place: dict[str, float], group: PlacementGroup, command: list[str]) -> int:
    """Starts a process in each place of the group and returns one exit code for all."""
    others = {name: amount for name, amount in place.items() if name not in ("CPU", "GPU")}
    hosts = [
        ray.remote(Host)
        .options(
            num_cpus=place["CPU"],
            num_gpus=place.get("GPU", 0.0),
            resources=others,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number),
        )
        .remote()
        for number in range(spec.nodes)
    ]
    told = {"JAX_COORDINATOR_ADDRESS": ray.get(hosts[0].address.remote()), "JAX_NUM_PROCESSES": str(spec.nodes)}
    for number, host in enumerate(hosts):
        # The process ends with the actor that started it, whatever ends that.
        tied = ["setpriv", "--pdeathsig", "KILL", *command]
        ray.get(host.start.remote(tied, told | {"JAX_PROCESS_ID": str(number)}))
    return ended([Remote(host) for host in hosts], spec.grace)


def main(folder: str, task: str) -> int:
    """`drive` as it is started: a file of the submission that cannot be read is told in one line."""
    try:
        return drive(Path(folder), int(task))
    except UserError as e:
        sys.stderr.write(f"error: {e}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
