"""The offline tokenisation job: datasets of raw documents become datasets of ids and code grids.

One input shard becomes one output shard, written under a temporary name and renamed, then its marker. A job that was
killed anywhere goes on when it is run again, with the same output and at most the shards that were being written done
anew; several processes may each take a share of the shards.
"""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mmgpt.core.document import Document
from mmgpt.core.log import counter
from mmgpt.data.record import Dataset, write_shard
from mmgpt.tokenize import shards
from mmgpt.tokenize.tokenizers import JobError, Tokenizers
from mmgpt.tokenize.work import Shard, Window, Work


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenised:
    """What a job did: shards written now and in all, documents, rejects; `complete`: the dataset can be read."""

    directory: Path
    written: int
    shards: int
    documents: int
    rejected: int
    complete: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """What to tokenise: raw datasets and the folder of each one's output, and what the output depends on.

    Media keep their aspect at no more than `area` pixels a frame; clips are read at `fps` and cut after `frames`, which
    the meta of their document then tells (`cut`). Where `temporal` frames share codes, a clip's last group is filled up
    with its last frame, so that nothing is lost; `fps` in the output stays the rate of frames. With `share` (i, n) this
    process does every n-th shard, and whichever ends last writes the manifest.
    """

    folders: dict[Path, Path]
    area: int
    fps: float | None = None
    frames: int = 256
    share: tuple[int, int] = (0, 1)

    def jobs(self, tokenizers: dict[str, Any]) -> list["Job"]:
        """A job for each dataset, given the settings of the tokenizers. Raises DatasetError and JobError."""
        if self.area < tokenizers["patch"] ** 2:
            side = tokenizers["patch"]
            raise JobError(f"area {self.area} holds no patch of {side}x{side} pixels; raise the area.")
        if self.fps is not None and not 0.0 < self.fps < math.inf:
            raise JobError(f"clips cannot be read at {self.fps} frames a second; give a number above 0.")
        if self.frames < 1:
            raise JobError(f"clips cannot be cut after {self.frames} frames; give 1 or more.")
        if not 0 <= self.share[0] < self.share[1]:
            raise JobError(f"share {self.share[0]} of {self.share[1]} does not exist; shares are 0 to n - 1 of n.")
        if len(set(self.folders.values())) < len(self.folders):
            raise JobError("two datasets have one name, and so one output. Tokenise them to different folders.")
        settings = {"area": self.area, "fps": self.fps, "frames": self.frames, **tokenizers}
        return [Job(source, out, settings, self.share) for source, out in self.folders.items()]


def parse_share(text: str) -> tuple[int, int]:
    """`2/8` as (2, 8). Raises JobError."""
    first, slash, second = text.partition("/")
    if not (slash and first.isdecimal() and second.isdecimal()):
        raise JobError(f"the share {text!r} is not i/n, such as 0/4; shares are 0 to n - 1 of n.")
    return int(first), int(second)


class Job:
    """One dataset to tokenise: what of it is done, and its completion."""

    def __init__(self, source: Path, out: Path, settings: dict[str, Any], share: tuple[int, int]) -> None:
        self.dataset = Dataset(source)
        if out.resolve() == source.resolve():
            raise JobError(f"{out}: is the source itself. Name another folder for the output.")
        made = self.dataset.manifest["meta"].get("settings", {})
        if any(made.get(probe, settings[probe]) != settings[probe] for probe in ("text_probe", "image_probe")):
            raise JobError(f"{source}: is tokenised already, with other tokenizers. Name the raw dataset.")
        self.out, self._share = out, share
        listed = self.dataset.manifest["shards"]
        self.paths = [out / shard["file"] for shard in listed]
        self.starts = np.cumsum([0, *(shard["documents"] for shard in listed)]).tolist()
        self.settings = {**settings, "source": [shard["sha256"] for shard in listed]}
        self.digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    def numbers(self, shard: int) -> range:
        """The documents of a shard."""
        return range(self.starts[shard], self.starts[shard + 1])

    def mine(self) -> range:
        """The shards of this process."""
        return range(self._share[0], len(self.paths), self._share[1])

    def begin(self) -> list[int]:
        """Clears away what a killed process left, and tells which of this process' shards are to be written."""
        self.out.mkdir(parents=True, exist_ok=True)
        alone = self._share[1] == 1
        shards.sweep(self.out, None if alone else {self.paths[i].name for i in self.mine()})
        return [i for i in self.mine() if shards.finished(self.paths[i], self.digest) is None]

    def end(self, written: int) -> Tokenised:
        """Makes the output a dataset if every shard is done."""
        found = {path: marker for path in self.paths if (marker := shards.finished(path, self.digest)) is not None}
        whole = len(found) == len(self.paths)
        if whole:
            shards.complete(self.out, self.dataset.name, found, self.settings)
        return Tokenised(
            directory=self.out,
            written=written,
            shards=len(self.paths),
            documents=sum(marker["documents"] for marker in found.values()),
            rejected=sum(len(marker["rejects"]) for marker in found.values()),
            complete=whole,
        )


Place = tuple[int, int]
"""A shard of the job: number of the dataset, number of the shard in it."""
Engine = Callable[[list[Job], list[Place], Callable[[int], None]], None]
"""Writes the shards of some places, and tells how many documents are done as they are."""


def run(jobs: list[Job], engine: Engine) -> list[Tokenised]:
    """Tokenises what is not done yet. Raises JobError, DatasetError, RecordError; what was finished stays."""
    todo = [(j, shard) for j, job in enumerate(jobs) for shard in job.begin()]
    mine = [(j, shard) for j, job in enumerate(jobs) for shard in job.mine()]
    total, ahead = (sum(len(jobs[j].numbers(shard)) for j, shard in places) for places in (mine, todo))
    with counter(total, label="tokenise", done=total - ahead) as advance:
        if todo:
            engine(jobs, todo, advance)
    return [job.end(sum(1 for place in todo if place[0] == j)) for j, job in enumerate(jobs)]


def write(work: Work, jobs: list[Job], places: Iterable[Place], advance: Callable[[int], None]) -> None:
    """Writes shards one after another in this process: decoding goes on from one to the next while it encodes."""
    sources = (Shard(dataset=jobs[j].dataset, numbers=jobs[j].numbers(i), place=(j, i)) for j, i in places)
    for (j, i), windows in itertools.groupby(work.windows(sources), key=lambda window: window.shard.place):
        path, rejects = jobs[j].paths[i], list[dict[str, str]]()
        info = write_shard(path, _documents(work, windows, rejects, advance))
        shards.mark(path, jobs[j].digest, info, rejects)


def _documents(
    work: Work, windows: Iterator[Window], rejects: list[dict[str, str]], advance: Callable[[int], None]
) -> Iterator[Document]:
    """The tokenised documents of a shard's windows; those that fail are added to `rejects`."""
    for window in windows:
        yield from work.encoded(window)
        rejects += window.rejects
        advance(window.seen)


def tokenize(order: Order, tokenizers: Tokenizers, threads: int = 0) -> list[Tokenised]:
    """Tokenises datasets in this process; run again after a stop, it goes on where it was.

    What fails goes to rejects.jsonl. Raises DatasetError, and JobError if an output was made otherwise.
    """
    work = Work(tokenizers=tokenizers, area=order.area, fps=order.fps, frames=order.frames, threads=threads)
    jobs = order.jobs(tokenizers.settings())
    return run(jobs, lambda jobs, places, advance: write(work, jobs, places, advance))
