"""A folder of checkpoints in which a step is whole or absent, shared by all processes or each process's own.

A step is written as `7.saving`, gets its `manifest.json` (the sha256 of every file, the tree, the position in the
data), and only then its name `7`. A damaged step is renamed `7.corrupt-1`, never deleted.
"""

import secrets
import shutil
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mmgpt.core.log import console, printable
from mmgpt.dist import hosts
from mmgpt.dist.agreement import agree, together
from mmgpt.train import arrays, manifest, shards
from mmgpt.train.arrays import State

Body = dict[str, Any]
Write = Callable[[], dict[str, Any]]
"""Writes what was copied to the host, and returns what the manifest has to say of it."""


class Tier(ABC):
    """The steps of one folder. Every process calls every method but `steps`, in the same order.

    What one of them raises, all raise: there the exception itself, elsewhere Elsewhere.
    """

    def __init__(self, name: str, directory: Path, *, owner: bool, quiet: bool) -> None:
        self.directory = directory
        self.failures = 0
        """Saves that failed since the last one that succeeded."""
        self.failure: Exception | None = None
        """What the last of them met."""
        self.saved: int | None = None
        """The step that was saved last, which need not be written again."""
        self._name = name  # in messages, as in "checkpoint 7"
        self._owner = owner  # whether this process names and deletes the folder's steps
        self._quiet = quiet
        self._finishing: threading.Thread | None = None

    def clean(self) -> None:
        """Makes the folder, and removes from it what a kill left."""
        if not self._owner:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        _remove(p for p in self.directory.iterdir() if ".saving" in p.name or p.name.endswith(".deleting"))
        for folder in sorted(self.directory.iterdir()):
            if folder.name.isdecimal() and not (folder / manifest.NAME).is_file():
                console.print(f"{self._name} {folder.name} has lost its {manifest.NAME}", style="bold red")
                self.set_aside([int(folder.name)], "corrupt")

    def steps(self) -> list[int]:
        """Complete steps that this process sees, oldest first."""
        return sorted(
            int(p.parent.name) for p in self.directory.glob(f"*/{manifest.NAME}") if p.parent.name.isdecimal()
        )

    def common(self) -> list[int]:
        """The steps that all processes can load, oldest first."""
        return agree(f"{self._name}: steps", self.steps(), self._of_all)

    def save(self, step: int, state: State, body: Body) -> None:
        """Returns once the arrays are copied to the host; `wait` says how it went. Replaces the step if it exists."""
        self.wait()
        if step == self.saved:
            return
        saving = self.directory / f"{step}.saving"
        if self._owner:
            _remove(self.directory.glob(f"{saving.name}*"))
        try:
            write = self._copy(saving, state)
        except OSError as e:
            write = _refused(e)  # told with the others, who wait for this process
        self._finishing = threading.Thread(target=self._finish, args=(write, saving, body), name=f"save step {step}")
        self._finishing.start()

    def wait(self) -> bool:
        """Waits for the save in flight; whether the last save succeeded."""
        if self._finishing is not None:
            self._finishing.join()
            self._finishing = None
        return self.failures == 0

    def read(self, step: int) -> Body:
        """The manifest of a step; raises Damage."""
        return together(f"{self._name}: read", lambda: manifest.read(self.directory / str(step)))

    def verify(self, step: int) -> Body:
        """The same, and all files are as they were saved."""

        def check() -> Body:
            folder = self.directory / str(step)
            body = manifest.read(folder)
            manifest.verify(folder, body, *self._share())
            return body

        return together(f"{self._name}: verify", check)

    def fits(self, body: Body, wanted: State) -> bool:
        """Whether the devices of all processes find there what they want."""
        return True

    def load(self, step: int, body: Body, wanted: State, partial: bool) -> State:
        """The arrays of a verified step, with the shardings asked for; raises whatever the reader does."""
        folder = self.directory / str(step)
        return together(f"{self._name}: load", lambda: self._load(folder, body, wanted, partial))

    def set_aside(self, steps: Iterable[int], what: str) -> None:
        """Renames steps, as 7 to `7.corrupt-1`."""
        for step in steps if self._owner else ():
            folder, number = self.directory / str(step), 1
            while (target := folder.with_name(f"{folder.name}.{what}-{number}")).exists():
                number += 1
            if folder.exists():  # a process whose own step is whole has nothing to rename
                folder.rename(target)
                console.print(f"{printable(str(folder))} was renamed {target.name}", style="bold red")

    def remove_aside(self, what: str) -> None:
        """Deletes the steps that were set aside as `what`."""
        if self._owner:
            _remove(self.directory.glob(f"*.{what}-*"))

    @abstractmethod
    def _of_all(self, steps: Sequence[list[int]]) -> list[int]:
        """The steps that all can load, from what each process sees."""

    @abstractmethod
    def _copy(self, saving: Path, state: State) -> Write:
        """Copies the arrays to the host; they may be donated then."""

    @abstractmethod
    def _commit(self, write: Write, saving: Path, body: Body) -> None:
        """Writes a step and gives it its name, on all processes or on none."""

    @abstractmethod
    def _load(self, folder: Path, body: Body, wanted: State, partial: bool) -> State: ...

    @abstractmethod
    def _share(self) -> tuple[int, int]:
        """This process's share of a step's files to hash: (which, of how many)."""

    def _finish(self, write: Write, saving: Path, body: Body) -> None:
        """Runs beside the training."""
        try:
            self._commit(write, saving, body)
            self.saved, self.failures = body["step"], 0
        except Exception as e:
            self._fail(body["step"], e)
            if self._owner:
                _remove(self.directory.glob(f"{saving.name}*"))

    def _fail(self, step: int, error: Exception) -> None:
        self.saved, self.failures, self.failure = None, self.failures + 1, error
        if not self._quiet:
            reason = printable(" ".join(str(error).split()), 300)
            console.print(f"{self._name} {step} was not saved: {type(error).__name__}: {reason}", style="bold red")
            console.print(f"The run goes on; complete: {self.steps()}, failed in a row: {self.failures}.")

    def _rename(self, saving: Path) -> None:
        final = saving.with_suffix("")
        if final.exists():
            self._delete([int(final.name)])
        saving.rename(final)

    def _delete(self, steps: Iterable[int]) -> None:
        for step in steps:
            # Renamed first: a kill in the middle must not leave half a step under a step's name.
            folder = self.directory / str(step)
            doomed = folder.with_name(f"{folder.name}.deleting")
            _remove([doomed])
            folder.rename(doomed)
            _remove([doomed])


class Shared(Tier):
    """A folder that all processes see: each writes and hashes its part of a step, the lead names and deletes it."""

    def __init__(self, directory: Path, *, keep: int, keep_every: int | None, quiet: bool) -> None:
        super().__init__("checkpoint", directory, owner=hosts.is_lead(), quiet=quiet)
        self._keep, self._keep_every = keep, keep_every

    def _of_all(self, steps: Sequence[list[int]]) -> list[int]:
        return steps[0]

    def _copy(self, saving: Path, state: State) -> Write:
        return arrays.start(saving, state)

    def _load(self, folder: Path, body: Body, wanted: State, partial: bool) -> State:
        return arrays.load(folder, wanted, partial)

    def _share(self) -> tuple[int, int]:
        return hosts.process_index(), hosts.process_count()

    def _commit(self, write: Write, saving: Path, body: Body) -> None:
        def written() -> dict[str, str]:
            body.update(write())
            return manifest.hashes(saving, arrays.written_by(hosts.process_index(), manifest.files(saving)))

        def collect(parts: list[dict[str, str]]) -> None:
            for part in parts:
                files.update(part)

        def name() -> None:
            if self._owner:
                rest = manifest.hashes(saving, manifest.files(saving) - files.keys())
                manifest.seal(saving, body, files | rest)
                self._rename(saving)
                every = self._keep_every
                self._delete(s for s in self.steps()[: -self._keep] if every is None or s % every)

        files: dict[str, str] = {}  # of all, on the lead
        agree(f"{self._name}: hashes", together(f"{self._name}: written", written), collect)
        together(f"{self._name}: named", name)


class Local(Tier):
    """A folder that each process has to itself, for its own shards: a step gets its name once all have written theirs.

    Before a step is written all others are deleted but the newest `keep - 1` that every process has: a kill between two
    renames leaves one that all have.
    """

    def __init__(self, directory: Path, *, keep: int) -> None:
        super().__init__("local checkpoint", directory, owner=True, quiet=False)
        self._keep = keep

    def _of_all(self, steps: Sequence[list[int]]) -> list[int]:
        return sorted(set.intersection(*map(set, steps)))

    def fits(self, body: Body, wanted: State) -> bool:
        # A host may hold a step of the same number from a life that another one had no part in.
        told = agree(f"{self._name}: fits", [shards.has(body, wanted), body.get("save")], lambda said: said)
        return all(has for has, _ in told) and len({save for _, save in told}) == 1

    def _copy(self, saving: Path, state: State) -> Write:
        return shards.start(saving, state)

    def _load(self, folder: Path, body: Body, wanted: State, partial: bool) -> State:
        return shards.load(folder, body, wanted)

    def _share(self) -> tuple[int, int]:
        return 0, 1

    def _commit(self, write: Write, saving: Path, body: Body) -> None:
        # Later steps are of a future that this run has left.
        before = [step for step in self.common() if step < body["step"]]
        save = agree(f"{self._name}: save", secrets.token_hex(8), lambda said: said[0])

        def written() -> None:
            _remove(self.directory.glob("*.*-*"))  # which was set aside, and would soon fill a RAM disk
            self._delete(step for step in self.steps() if step not in before[1 - self._keep :])
            said = body | write() | {"save": save}
            manifest.seal(saving, said, manifest.hashes(saving, manifest.files(saving)))

        together(f"{self._name}: written", written)
        self._rename(saving)


def _refused(error: OSError) -> Write:
    def write() -> dict[str, Any]:
        raise error

    return write


def _remove(folders: Iterable[Path]) -> None:
    for folder in list(folders):
        shutil.rmtree(folder, ignore_errors=True)
