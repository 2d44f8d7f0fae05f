"""Renders a Ray job for each task and submits it with `ray job submit`, which follows it until it ends.

The job is `ray_driver.py` of the submission's code, which starts the processes on as many machines as the job has
nodes, and starts them again when they exit with 75 or, a bounded number of times, fail. Ray's job interface runs any
code for whoever reaches it, so only one on this machine is spoken to.
"""

import ipaddress
import math
import socket
from urllib.parse import urlsplit

from .spec import Job, JobSpec, LaunchError, Platform

CONNECT_SECONDS = 10.0


class Ray(Platform):
    """Options of Ray."""

    program = "ray"
    comes_with = "Ray with its job interface (pip install 'mmgpt[ray]')"

    address: str = "http://127.0.0.1:8265"
    """Of the job interface; for a distant cluster forward its port to this machine, as with ssh -L."""
    allow_remote: bool = False
    """Whether the interface may be of another machine: whoever reaches it can run any code on the cluster."""
    cpus_per_node: float = 1.0
    """CPUs, as Ray counts them, that each process takes."""
    resource: str = "GPU"
    """Ray's name of the chips: GPU or TPU."""

    def check(self, spec: JobSpec, tasks: int) -> None:
        try:
            parts = urlsplit(self.address)
            host = parts.hostname if parts.scheme in ("http", "https") and parts.port != 0 else None
        except ValueError:  # a port or an IPv6 address that is none
            host = None
        if not host:
            raise LaunchError(f"ray.address {self.address!r} is not http://HOST:PORT.")
        if not 0 <= self.cpus_per_node < math.inf:
            raise LaunchError(f"ray.cpus_per_node is {self.cpus_per_node}; give a number of 0 or more.")
        if not self.allow_remote and not _is_here(host):
            raise LaunchError(
                f"ray.address {self.address} is of another machine. Ray's job interface asks nobody who they are, so "
                "forward its port to this one (ssh -L 8265:127.0.0.1:8265 HEAD), or give --ray.allow-remote True."
            )
        if spec.processes_per_node != 1:
            raise LaunchError("Ray starts one process a node: leave job.processes_per_node at 1 and give more nodes.")
        if spec.minutes:
            raise LaunchError("a Ray job has no time limit: leave job.minutes at 0.")

    def ready(self) -> None:
        super().ready()
        parts = urlsplit(self.address)
        try:
            socket.create_connection((parts.hostname, parts.port or 80), CONNECT_SECONDS).close()
        except OSError as e:
            raise LaunchError(
                f"nothing answers at ray.address {self.address} ({e}): start the cluster there with `ray start --head "
                "--dashboard-host 127.0.0.1`, or forward its port to this machine."
            ) from e

    def render(self, job: Job) -> dict[str, str]:
        return {}

    def commands(self, job: Job) -> list[list[str]]:
        return [
            [
                *["ray", "job", "submit", f"--address={self.address}"],
                f"--submission-id={job.name(task)}-{job.folder.name}",
                *(["--no-wait"] if job.spec.sweep else []),
                *["--", "env", f"PYTHONPATH={job.folder / 'code'}", "PYTHONSAFEPATH=1"],
                *[job.spec.python, "-m", f"{__package__}.ray_driver", str(job.folder), str(task)],
            ]
            for task in range(len(job.run_dirs))
        ]


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
