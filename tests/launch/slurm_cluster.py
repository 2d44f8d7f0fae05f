"""A real Slurm cluster of two nodes on this machine, from Debian's packages: installed, or unpacked into a folder.

Each node's daemon lives in a process namespace of its own, so that a node is lost as machines are: all of its
processes end at once, without a signal that they could catch. Unpacking and namespaces need root.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "munge", "libmunge2", "libhwloc15")
NODES = ("n0", "n1")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mmgpt" / "slurm"

ENDED = (
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"),
    *("PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"),
)
"""States of a job that is done; all others pass, as SIGNALING does, which a job is in while it is sent a signal."""

WITH_ME = ("setpriv", "--pdeathsig", "KILL")
"""What makes a daemon end with the process that started it, whatever ends that."""

CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
PluginDir={plugins}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_min_interval=0,requeue_delay=0
ReturnToService=2
KillWait=10
MpiDefault=none
SlurmdParameters=config_overrides
SlurmctldTimeout=10
SlurmdTimeout=10
MinJobAge=600
NodeName=n[0-1] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Unavailable(Exception):
    """Why no cluster can be started here, in a sentence."""


def unpacked() -> Path:
    """The folder that holds Slurm's `usr/`: the root where it is installed, else unpacked packages in the cache."""
    if os.geteuid() != 0:
        raise Unavailable("a Slurm cluster of tests needs root, for process namespaces and munge")
    if shutil.which("slurmctld") and shutil.which("munged"):
        return Path("/")
    if (CACHE / "done").exists():
        return CACHE
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise Unavailable("Slurm is not installed, and there is no apt-get here that would fetch Debian's packages")
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE.parent) as folder:
        fetched = _quietly("apt-get", "download", *PACKAGES, cwd=folder)
        if fetched.returncode != 0:
            _quietly("apt-get", "update", cwd=folder)
            fetched = _quietly("apt-get", "download", *PACKAGES, cwd=folder)
        if fetched.returncode != 0:
            raise Unavailable(f"Slurm is not installed, and apt-get cannot fetch it: {fetched.stderr.strip()[-300:]}")
        root = Path(folder) / "root"
        for package in Path(folder).glob("*.deb"):
            subprocess.run(["dpkg", "-x", package, root], check=True)
        (root / "done").touch()
        with contextlib.suppress(OSError):  # another process was first
            root.rename(CACHE)
    return CACHE


def _quietly(*command: str, cwd: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


class Cluster:
    """Daemons of one cluster in a folder; `environment` makes Slurm's commands speak to it."""

    def __init__(self, folder: Path) -> None:
        root = unpacked()
        self.folder = folder
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        libraries = next((root / "usr/lib").glob("*/slurm-wlm"))
        self._root = root
        own = {"SLURM_CONF": str(folder / "slurm.conf")}
        if root != Path("/"):
            own["PATH"] = f"{root}/usr/bin:{root}/usr/sbin:{os.environ['PATH']}"
            own["LD_LIBRARY_PATH"] = f"{libraries.parent}:{libraries}"
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")} | own
        for name in ("state", "munge"):
            (folder / name).mkdir()
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        text = CONFIGURATION.format(
            host=socket.gethostname(), user="root", folder=folder, plugins=libraries, ports=_free_ports(3)
        )
        (folder / "slurm.conf").write_text(text)

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for daemon in reversed(self._daemons.values()):
            daemon.kill()
        for daemon in self._daemons.values():
            daemon.wait(20)

    def _start(self) -> None:
        places = [f"--{name}={self.folder}/munge.{name}" for name in ("socket", "log-file", "pid-file", "seed-file")]
        self._daemon("munged", "--foreground", "--force", f"--key-file={self.folder}/munge.key", *places)
        self.until(lambda: (self.folder / "munge.socket").exists(), "munged has no socket")
        self._daemon("slurmctld", "-D", "-i")
        for node in NODES:
            self.gain(node)
        self.until(lambda: self.states() == ["idle"] * len(NODES), lambda: f"nodes are {self.states()}")

    def _daemon(self, name: str, *arguments: str, before: tuple[str, ...] = (), key: str = "") -> None:
        program = next(p for p in (self._root / "usr/sbin" / name, self._root / f"usr/sbin/{name}-wlm") if p.exists())
        with open(self.folder / f"{key or name}.out", "ab") as out:
            self._daemons[key or name] = subprocess.Popen(
                [*WITH_ME, *before, str(program), *arguments], env=self.environment, stdout=out, stderr=out
            )

    def gain(self, node: str) -> None:
        """Starts a node, also one that was lost."""
        stepd = next(p for p in (self._root / "usr/sbin").glob("slurmstepd*"))
        space = ("unshare", "--fork", "--pid", "--mount-proc", "--kill-child")
        self._daemon("slurmd", "-D", "-N", node, "-d", str(stepd), before=space, key=node)

    def lose(self, node: str) -> None:
        """Ends a node with all that runs and lies on it, and tells the controller, which would await its time-out."""
        self._daemons[node].kill()
        self._daemons[node].wait()
        shutil.rmtree(self.folder / f"spool-{node}")
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")

    def run(self, *command: str) -> str:
        """The output of one of Slurm's commands."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{command}: {done.stderr}{done.stdout}")
        return done.stdout

    def states(self) -> list[str]:
        """The nodes' states."""
        try:
            return self.run("sinfo", "--noheader", "--Node", "--format=%t").split()
        except RuntimeError:
            return []  # the controller is not there yet

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says of a job."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def requeued(self, number: str) -> None:
        """Waits until a job is back in the queue, and has it begin soon: Slurm lets two minutes go by.

        Not at once, since nodes refuse a start of the very second in which they ended the one before.
        """

        def waits() -> bool:
            job = self.job(number)
            return (job["JobState"], job["Reason"]) == ("PENDING", "BeginTime") and {*self.states()} == {"idle"}

        self.until(waits, lambda: f"not queued again: {self.job(number)}, nodes {self.states()}")
        self.run("scontrol", "update", f"jobid={number}", "starttime=now+3")

    def ended(self, number: str, otherwise: Callable[[], str], seconds: float = 180.0) -> dict[str, str]:
        """Waits for a job's end; what Slurm says of it then."""
        self.until(lambda: self.job(number)["JobState"] in ENDED, lambda: f"{self.job(number)}\n{otherwise()}", seconds)
        return self.job(number)

    def until(self, holds: Callable[[], bool], otherwise: str | Callable[[], str], seconds: float = 180.0) -> None:
        """Waits for something; AssertionError when it does not come."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, otherwise if isinstance(otherwise, str) else otherwise()
            time.sleep(0.1)


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """A cluster in a folder of its own; Unavailable tells why there is none."""
    # Not the tests' temporary folder: the path of a socket has at most 108 characters.
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/var/tmp") as folder, Cluster(Path(folder)) as made:
        yield made


def _free_ports(count: int) -> list[int]:
    """Free ports in a row."""
    while True:
        with contextlib.ExitStack() as held:
            first = held.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            start = first.getsockname()[1]
            try:
                for port in range(start + 1, start + count):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return list(range(start, start + count))
