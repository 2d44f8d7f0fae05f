"""Renders `job.sbatch`, one batch script for a run or an array of them, and submits it with `sbatch`.

The processes get SIGTERM before the time limit, save and exit with 75; the script then puts the job back into the
queue. Slurm itself does so when a node is lost. The shell does not catch SIGTERM: `scancel JOB` ends the job for good,
and `scancel --signal=TERM JOB`, which reaches the processes alone, lets it save and come back.
"""

import re

import tyro

from .process import loop_script, quote
from .spec import Job, JobSpec, LaunchError, Platform


class Slurm(Platform):
    """Options of Slurm; empty ones are the cluster's defaults."""

    program = "sbatch"
    comes_with = "Slurm's client programs (Debian: slurm-client), or submit from a login node"
    tells = ('export JAX_PROCESS_ID="$SLURM_PROCID"',)

    partition: str = ""
    account: str = ""
    qos: str = ""
    cpus_per_process: int = 0
    """Cores of each process; 0 takes whole nodes with all their memory."""
    options: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """One more option of sbatch, as '--constraint=ib'. May be given several times."""

    def check(self, spec: JobSpec, tasks: int) -> None:
        if "\\" in spec.run_dir:
            raise LaunchError(f"{spec.run_dir}: sbatch reads a backslash as an escape; give another run folder.")
        if self.cpus_per_process < 0:
            raise LaunchError(f"slurm.cpus_per_process is {self.cpus_per_process}; it must be at least 0.")
        for option in self.options:
            if not re.fullmatch(r"--[a-z-]+(=.*)?", option):
                raise LaunchError(f"slurm.options {option!r} is no option of sbatch: write it as '--name=value'.")

    def render(self, job: Job) -> dict[str, str]:
        spec = job.spec
        lines = [
            "#!/bin/bash",
            *(f"#SBATCH {option}" for option in self._options(job)),
            f"job={quote(job.folder)}",
            'if ! srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 test -r "$job/start.sh"; then',
            '  echo "not all nodes can read $job: the run folder must lie on storage that they share" >&2',
            "  exit 1",
            "fi",
            "# The address by which Slurm itself reaches the first node; a node's name need not resolve.",
            'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            'address=$(scontrol show node "$first" | grep -o "NodeAddr=[^ ]*")',
            'export JAX_COORDINATOR_ADDRESS="${address#NodeAddr=}:$((61440 + SLURM_JOB_ID % 4096))"',
            'export JAX_NUM_PROCESSES="$SLURM_NTASKS"',
            *loop_script(_step(spec), 'scontrol requeue "$SLURM_JOB_ID"; exit', spec.max_restarts),
        ]
        return {"job.sbatch": "\n".join(lines) + "\n"}

    def commands(self, job: Job) -> list[list[str]]:
        """Slurm is asked first whether it has such nodes: it would queue a job for good that needs more."""
        script = str(job.folder / "job.sbatch")
        return [["sbatch", "--test-only", script], ["sbatch", script]]

    def _options(self, job: Job) -> list[str]:
        """The lines after #SBATCH, which sbatch reads with a shell's quotes; it replaces % in the name of the log."""
        spec = job.spec
        log = f"{job.folder}/logs/".replace("%", "%%") + ("slurm-%A_%a.log" if spec.sweep else "slurm-%j.log")
        named = {"partition": self.partition, "account": self.account, "qos": self.qos}
        chips = f"{spec.accelerator}:{spec.chips_per_node}" if spec.accelerator else spec.chips_per_node
        return [
            f"--job-name={spec.name}",
            f"--nodes={spec.nodes}",
            f"--ntasks-per-node={spec.processes_per_node}",
            *([f"--cpus-per-task={self.cpus_per_process}"] if self.cpus_per_process else ["--exclusive", "--mem=0"]),
            *([f"--gpus-per-node={quote(chips)}"] if spec.chips_per_node else []),
            *([f"--time={spec.minutes}"] if spec.minutes else []),
            f"--signal=TERM@{spec.grace}",
            "--requeue",
            *([f"--array=0-{len(job.run_dirs) - 1}"] if spec.sweep else []),
            f"--output={quote(log)}",
            "--open-mode=append",
            *(f"--{name}={quote(value)}" for name, value in named.items() if value),
            *(quote(option) for option in self.options),
        ]


def _step(spec: JobSpec) -> str:
    """The command line that starts all processes; those that others leave behind have `grace` seconds to end."""
    options = [
        "--export=ALL",  # what is set above, also where sbatch was told to export nothing
        "--label",
        "--kill-on-bad-exit=0",
        f"--wait={spec.grace}",
        f'--cpus-per-task="$((SLURM_CPUS_ON_NODE / {spec.processes_per_node}))"',
        *([f"--gpus-per-task={spec.chips_per_node // spec.processes_per_node}"] if spec.chips_per_node else []),
    ]
    task = '"$SLURM_ARRAY_TASK_ID"' if spec.sweep else "0"
    return f'srun {" ".join(options)} bash "$job/start.sh" {task}'
