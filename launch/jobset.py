"""Renders a JobSet for each task (`jobset-0.json`, ...), one pod a machine, and creates it with `kubectl`.

A pod that exits with 75, or is evicted with its node, fails its Job by a pod failure policy; the JobSet is then made
anew without counting it. Other failures count up to `maxRestarts`. Pods of TPU slices are told of each other by GKE,
others by the first pod's name in the JobSet's own DNS domain.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

from mmgpt.core.errors import UsageError

from .process import PREEMPTED
from .spec import LABEL_LENGTH, Job, JobSpec, LaunchError, Platform

PORT = 8476
WORKERS = "workers"
SUFFIX = 6
"""Characters that Kubernetes adds to a pod's name."""


class JobSet(Platform):
    """Options of Kubernetes; JobSet's controller must be installed there, and Kueue where a queue is given."""

    shares_machine = False
    program = "kubectl"
    comes_with = "kubectl of your cluster's version, with a context that reaches it"

    image: str = ""
    """Container image with Python and mmgpt's dependencies; the code is the submission's."""
    claim: str = ""
    """PersistentVolumeClaim, writable by many pods, that holds the run folder."""
    mount: str = ""
    """Where it is mounted, here and in the pods; the run folder lies below it."""
    namespace: str = "default"
    queue: str = ""
    """Kueue's LocalQueue."""
    topology: str = ""
    """Chips of a TPU slice along its axes, as 4x4x4; without it chips are GPUs."""

    def check(self, spec: JobSpec, tasks: int) -> None:
        for name in ("image", "claim", "mount"):
            if not vars(self)[name]:
                raise UsageError(f"jobset.{name} is not given; `--backend jobset --help` says what it is.")
        if spec.processes_per_node != 1:
            raise LaunchError("a JobSet has one process a pod: leave job.processes_per_node at 1 and give more nodes.")
        if not Path(spec.run_dir).is_relative_to(self.mount) or not Path(self.mount).is_absolute():
            raise LaunchError(f"--run-dir {spec.run_dir} does not lie below jobset.mount {self.mount}.")
        last = f"{spec.name}{f'-{tasks - 1}' if tasks > 1 else ''}-{WORKERS}-0-{spec.nodes - 1}"
        if len(last) > LABEL_LENGTH - SUFFIX:
            raise LaunchError(
                f"the last pod would be named {last}-xxxxx, longer than {LABEL_LENGTH} characters: give a --job.name "
                f"that is {len(last) - LABEL_LENGTH + SUFFIX} shorter."
            )
        if self.topology:
            self._check_slice(spec)

    def _check_slice(self, spec: JobSpec) -> None:
        if not re.fullmatch(r"\d+(x\d+){1,2}", self.topology):
            raise LaunchError(
                f"jobset.topology {self.topology!r}: give a slice's chips along its axes, as 4x4 or 4x4x4."
            )
        if not spec.accelerator or not spec.chips_per_node:
            raise LaunchError(
                "a TPU slice needs its kind and the chips of a host: give --job.accelerator, as tpu-v5p-slice, and "
                "--job.chips-per-node, as 4."
            )
        chips = math.prod(map(int, self.topology.split("x")))
        if chips != spec.nodes * spec.chips_per_node:
            raise LaunchError(
                f"a {self.topology} slice has {chips} chips, and {spec.nodes} nodes of {spec.chips_per_node} have "
                f"{spec.nodes * spec.chips_per_node}: give --job.nodes {chips // spec.chips_per_node}."
            )

    def render(self, job: Job) -> dict[str, str]:
        return {
            f"jobset-{task}.json": json.dumps(self._manifest(job, task), indent=2) + "\n"
            for task in range(len(job.run_dirs))
        }

    def commands(self, job: Job) -> list[list[str]]:
        """`create`, not `apply`: a job of that name that is there already must not be changed."""
        return [["kubectl", "create", f"--filename={job.folder / name}"] for name in self.render(job)]

    def _manifest(self, job: Job, task: int) -> dict[str, Any]:
        name = job.name(task)
        metadata: dict[str, Any] = {"name": name, "namespace": self.namespace}
        if self.queue:
            metadata["labels"] = {"kueue.x-k8s.io/queue-name": self.queue}
        if self.topology:
            # One slice is one node pool, and no other job's pods come in between.
            metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
        preempted = {
            "name": "preempted",
            "action": "RestartJobSetAndIgnoreMaxRestarts",
            "onJobFailureReasons": ["PodFailurePolicy", *(["DeadlineExceeded"] if job.spec.minutes else [])],
        }
        return {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": metadata,
            "spec": {
                "failurePolicy": {"maxRestarts": job.spec.max_restarts, "rules": [preempted]},
                "network": {"enableDNSHostnames": True, "subdomain": name},
                "replicatedJobs": [{"name": WORKERS, "replicas": 1, "template": {"spec": self._job(job, task)}}],
            },
        }

    def _job(self, job: Job, task: int) -> dict[str, Any]:
        """One pod a machine; the first that fails ends the Job, since the others cannot go on without it."""
        spec = job.spec
        return {
            "parallelism": spec.nodes,
            "completions": spec.nodes,
            "completionMode": "Indexed",
            "backoffLimit": 0,
            **({"activeDeadlineSeconds": spec.minutes * 60} if spec.minutes else {}),
            "podFailurePolicy": {
                "rules": [
                    {
                        "action": "FailJob",
                        "onExitCodes": {
                            "containerName": "train",
                            "operator": "In",
                            "values": [code for code in PREEMPTED if code > 0],
                        },
                    },
                    {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                ]
            },
            "template": {"spec": self._pod(job, task)},
        }

    def _pod(self, job: Job, task: int) -> dict[str, Any]:
        spec = job.spec
        chips = "google.com/tpu" if self.topology else "nvidia.com/gpu"
        amount = {chips: spec.chips_per_node} if spec.chips_per_node else {}
        container = {
            "name": "train",
            "image": self.image,
            "command": ["bash", str(job.folder / "start.sh"), str(task)],
            "env": [] if self.topology else _told(job.name(task), spec.nodes),
            "resources": {"limits": amount, "requests": amount},
            "volumeMounts": [{"name": "runs", "mountPath": self.mount}, {"name": "shm", "mountPath": "/dev/shm"}],
        }
        return {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": spec.grace,
            "nodeSelector": self._nodes(spec),
            "containers": [container],
            "volumes": [
                {"name": "runs", "persistentVolumeClaim": {"claimName": self.claim}},
                # A container's own has 64 MB, too little for the processes that load data.
                {"name": "shm", "emptyDir": {"medium": "Memory"}},
            ],
        }

    def _nodes(self, spec: JobSpec) -> dict[str, str]:
        if self.topology:
            return {
                "cloud.google.com/gke-tpu-accelerator": spec.accelerator,
                "cloud.google.com/gke-tpu-topology": self.topology,
            }
        return {"cloud.google.com/gke-accelerator": spec.accelerator} if spec.accelerator else {}


def _told(name: str, nodes: int) -> list[dict[str, Any]]:
    """What tells a pod of the others."""
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    return [
        {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{name}-{WORKERS}-0-0.{name}:{PORT}"},
        {"name": "JAX_NUM_PROCESSES", "value": str(nodes)},
        {"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}},
    ]
