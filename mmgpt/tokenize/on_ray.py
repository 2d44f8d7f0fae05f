"""The tokenisation job on Ray Data: workers, on this machine or on a cluster, each write whole shards.

A worker is told paths and numbers, opens the tokenizers once, and makes sure that they are the driver's. The output
is that of the job in one process.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mmgpt.core.errors import UserError
from mmgpt.tokenize.job import Job, JobError, Order, Place, Tokenised, run, write
from mmgpt.tokenize.tokenizers import Tokenizers
from mmgpt.tokenize.work import Work

_LOGICAL_CPUS = 4
"""Ray Data keeps some for itself: with 2 a small job stands still."""
_LOCAL = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # binds to 127.0.0.1: no other machine joins or reaches what is here
    "RAY_AUTH_MODE": "token",  # nor does another user of this machine
}
_MOST_STORE = 128 << 20  # bytes of Ray's shared memory: what passes through it is a few numbers a shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
    """Where the tokenizers are, as each worker opens them."""

    text: Path
    vision: Path
    actions: Path | None
    batch: int

    def load(self) -> Tokenizers:
        return Tokenizers.load(self.text, self.vision, self.actions, self.batch)


def tokenize_on_ray(
    order: Order, files: Files, *, threads: int = 0, workers: int = 0, address: str | None = None
) -> list[Tokenised]:
    """Tokenises datasets as `job.tokenize` does, by workers on this machine or on the cluster at `address`.

    By default there is a worker for each GPU, or one. All machines must see the same folders. A shard that fails ends
    the job, and what other workers finished stays. Raises JobError, DatasetError.
    """
    if workers < 0:
        raise JobError(f"--workers is {workers}; give 1 or more, or leave it out.")
    order = dataclasses.replace(order, folders={a.resolve(): b.resolve() for a, b in order.folders.items()})
    paths = {field: path.resolve() for field, path in vars(files).items() if isinstance(path, Path)}
    files = dataclasses.replace(files, **paths)
    with _ray(address, workers) as ray:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        resources = {"num_cpus": 1, "num_gpus": 1 if gpus else 0}
        probe = ray.remote(max_calls=1, max_retries=0, **resources)(_settings)  # its process ends, and frees the GPU
        settings = json.loads(_unwrapped(ray.get(probe.remote(files))))
        ordered = _Ordered(order=order, files=files, threads=threads, settings=json.dumps(settings))
        engine = functools.partial(_engine, ray, ordered, workers or max(1, gpus), resources)
        return run(order.jobs(settings), engine)


@contextlib.contextmanager
def _ray(address: str | None, workers: int) -> Iterator[Any]:
    """Ray, connected to a cluster or started here, quiet and closed to others; its errors as JobError."""
    os.environ.update({name: value for name, value in _LOCAL.items() if address is None or "USAGE" in name})
    temporary = None
    options: dict[str, Any] = {"address": address}
    if address is None:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        temporary = tempfile.mkdtemp(prefix="mmgpt-ray-")
        cpus = max(_LOGICAL_CPUS, os.cpu_count() or 1, workers + 2)
        options = {"address": "local", "num_cpus": cpus, "object_store_memory": _MOST_STORE, "_temp_dir": temporary}
    try:
        import ray
        import ray.data
        import ray.exceptions
    except ImportError as e:
        raise JobError("--engine ray needs Ray Data. Install it: pip install 'mmgpt[ray]'") from e
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray's are about its own parts
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, **options)
            yield ray
    except (ray.exceptions.RayError, ConnectionError) as e:
        last = str(e).strip().splitlines()[-1]
        raise JobError(f"Ray failed: {last}. What was finished stays; run the same command to go on.") from e
    finally:
        ray.shutdown()
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _engine(
    ray: Any,
    ordered: "_Ordered",
    workers: int,
    resources: dict[str, int],
    jobs: list[Job],
    places: list[Place],
    advance: Callable[[int], None],
) -> None:
    """Has each shard written by the first worker that is free."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    items = [{"dataset": j, "shard": i} for j, i in places]
    rows = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _Worker,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(items)), max_tasks_in_flight_per_actor=1),
        fn_constructor_args=(ordered, [job.digest for job in jobs]),
        # A worker that dies is not started again: a shard that kills one would kill them all.
        ray_remote_args_fn=lambda: {"max_restarts": 0, "max_task_retries": 0},
        **resources,
    )
    for row in rows.iter_rows():
        _unwrapped(row["told"])
        advance(row["documents"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Ordered:
    """What a worker is told: the order, the tokenizers' files, and as JSON what the driver knows of them."""

    order: Order
    files: Files
    threads: int
    settings: str


class _Worker:
    """Writes one shard a call; what is wrong comes back as text, for the driver to say."""

    def __init__(self, ordered: _Ordered, digests: list[str]) -> None:
        self._ordered, self._digests = ordered, digests
        self._opened: tuple[Work, list[Job]] | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        place = int(batch["dataset"][0]), int(batch["shard"][0])
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count

        def shard() -> str:
            work, jobs = self._open()
            write(work, jobs, [place], advance)
            return ""

        told = _told(shard)
        return {"told": np.array([told]), "documents": np.array([done])}

    def _open(self) -> tuple[Work, list[Job]]:
        if self._opened is None:
            order, driver = self._ordered.order, json.loads(self._ordered.settings)
            tokenizers = self._ordered.files.load()
            mine = tokenizers.settings()
            if mine != driver:
                apart = ", ".join(key for key in mine if mine[key] != driver.get(key))
                raise JobError(
                    f"the tokenizers of a worker on {os.uname().nodename} differ from the driver's ({apart}). Use "
                    "machines of one kind with the same files."
                )
            jobs = order.jobs(mine)
            if [job.digest for job in jobs] != self._digests:
                raise JobError(
                    f"the datasets that {os.uname().nodename} sees differ from the driver's. Share the folder."
                )
            work = Work(
                tokenizers=tokenizers,
                area=order.area,
                fps=order.fps,
                frames=order.frames,
                threads=self._ordered.threads,
            )
            self._opened = work, jobs
        return self._opened


def _settings(files: Files) -> str:
    return _told(lambda: "settings " + json.dumps(files.load().settings()))


def _told(function: Callable[[], str]) -> str:
    """What the function says, or "error" and the text of an error that the user can mend."""
    try:
        return function()
    except (UserError, OSError) as e:
        return f"error {e}"


def _unwrapped(told: str) -> str:
    kind, _, text = str(told).partition(" ")
    if kind == "error":
        raise JobError(text)
    return text
