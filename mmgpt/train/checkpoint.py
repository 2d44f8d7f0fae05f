"""Checkpoints that are whole or absent: Orbax writes the arrays, a manifest of hashes says that nothing changed since.

A step is written as `7.saving`, gets its `manifest.json` (the sha256 of every file, the tree, the position in the
data), and only then its name `7`. Orbax does not notice flipped bits and casts dtypes in silence, so a load verifies
the hashes and compares the tree first. A damaged step is renamed `7.corrupt-1`, never deleted, and the one before it
is used. This is the only file that knows Orbax.
"""

import dataclasses
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from mmgpt.core import config
from mmgpt.core.errors import UserError
from mmgpt.core.log import console, printable
from mmgpt.dist import hosts
from mmgpt.train import manifest

LISTED = 12
"""Differing leaves that an error names before it only counts the rest."""

State = dict[str, Any]

# Orbax logs the traceback of each of its threads; the error itself reaches us and is told in a line.
logging.getLogger("absl").addFilter(lambda record: "_SignalingThread.run() raised" not in record.getMessage())


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be used; the message says which, what was found and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """What a step holds: `tree` maps "params/layer/kernel" to "float32[64,128]"; `position` is the next global row."""

    step: int
    tree: dict[str, str]
    position: int
    meta: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
    """A loaded step: the arrays with the shardings asked for, the next global row, and the meta it was saved with."""

    step: int
    state: State
    position: int
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run, in one folder that all its processes see.

    Every process calls every method, in the same order. Use it as a context manager, or call `close`: a save still in
    flight when the interpreter exits is lost.
    """

    class Config(config.Config):
        """`keep` most recent steps stay, and for good those that `keep_every` divides."""

        keep: int = 3
        keep_every: int | None = None
        asynchronous: bool = True

        def build(self, directory: Path, *, read_only: bool = False, quiet: bool = False) -> "Checkpoints":
            """Opens the folder. A reader beside a living run must be `read_only`: others clean up what a kill left.

            With `quiet` it is the caller who tells that a save failed.
            """
            if self.keep < 1 or (self.keep_every is not None and self.keep_every < 1):
                raise config.ConfigError(f"keep={self.keep}, keep_every={self.keep_every}: expected numbers from 1 up.")
            if not read_only:
                check_path(directory)
            return Checkpoints(self, Path(directory), read_only, quiet)

    def __init__(self, settings: Config, directory: Path, read_only: bool, quiet: bool) -> None:
        self.directory = directory.absolute()
        self.failures = 0
        """Saves that failed since the last one that succeeded."""
        self.failure: Exception | None = None
        """What the last of them met."""
        self._settings = settings
        self._read_only = read_only
        self._quiet = quiet
        self._lead = hosts.is_lead()
        self._saved: int | None = None
        self._finishing: threading.Thread | None = None
        if not read_only and self._lead:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._clean()
        hosts.barrier(f"open {directory}")

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Complete steps on the disk, oldest first."""
        return sorted(
            int(p.parent.name) for p in self.directory.glob(f"*/{manifest.NAME}") if p.parent.name.isdecimal()
        )

    def save(self, step: int, state: State, position: int, meta: dict[str, Any]) -> None:
        """Saves a nested dict of arrays with the next global row and plain JSON `meta`; replaces the step if it exists.

        Returns once the arrays are copied to the host, so that they may be donated; `wait` says how it went. A save
        that fails is told on the console and counted in `failures`, and neither the run nor the next save minds.
        """
        if self._read_only:
            raise CheckpointError(f"{self.directory} was opened to read only; step {step} cannot be saved there.")
        body = {"step": step, "position": position, "meta": meta, "tree": _tree(state)}
        manifest.render(body)  # meta that is not plain JSON is a mistake of the caller, and raises here
        self.wait()
        if step == self._saved:
            return
        saving = self.directory / f"{step}.saving"
        try:
            if self._lead:
                _remove(self.directory.glob(f"{saving.name}*"))
            with _context():
                response = ocp.save_async(str(saving), state)
        except OSError as e:
            self._fail(step, e)
            return
        self._finishing = threading.Thread(target=self._finish, args=(response, saving, body), name=f"save step {step}")
        self._finishing.start()
        if not self._settings.asynchronous:
            self.wait()

    def wait(self) -> bool:
        """Waits for the save in flight; whether the last save of this process succeeded."""
        if self._finishing is not None:
            self._finishing.join()
            self._finishing = None
        return self.failures == 0

    def close(self) -> None:
        """Waits for the save in flight."""
        self.wait()

    def describe(self, step: int | None = None) -> Description | None:
        """What a step holds, the newest if none is named, from its manifest alone; None where there is none."""
        for candidate in reversed(self.steps()) if step is None else [step]:
            try:
                body = manifest.read(self.directory / str(candidate))
            except manifest.Damage as damage:
                if step is not None:
                    raise CheckpointError(f"{self.directory / str(step)}: {damage}") from damage
                continue
            return Description(**{f.name: body[f.name] for f in dataclasses.fields(Description)})
        return None

    def restore(
        self, abstract_state: State, step: int | None = None, only: Sequence[str] | None = None
    ) -> Restored | None:
        """Loads a step, the newest undamaged one if none is named, into the shapes, dtypes and shardings asked for.

        `abstract_state` is a nested dict of `jax.ShapeDtypeStruct` with shardings (without one: the first device);
        `only` names the parts of it to load, as in ("params",). None if nothing was ever saved. Raises CheckpointError
        if the tree differs from the saved one, if all steps are damaged, or if the named step is missing or damaged.
        """
        self.wait()
        wanted = jax.tree.map(_placed, abstract_state if only is None else {k: abstract_state[k] for k in only})
        skip: set[int] = set()
        while (candidate := self._candidate(step, skip)) is not None:
            folder = self.directory / str(candidate)
            body, damage = self._verify(folder)
            if body is not None:
                saved = {k: v for k, v in body["tree"].items() if only is None or k.split("/")[0] in only}
                _compare(folder, saved, _tree(wanted))
                return self._load(folder, body, wanted, partial=only is not None)
            if step is not None:
                raise CheckpointError(f"{folder}: {damage}. Choose another step of {self.steps()}.")
            skip.add(candidate)
            console.print(f"checkpoint {candidate} is damaged ({damage}); trying the one before it", style="bold red")
            if self._lead and not self._read_only:
                _set_aside(folder)
            hosts.barrier(f"set aside {folder.name}")
        aside = sorted(p.name for p in self.directory.glob("*.corrupt-*"))
        if step is not None or skip or aside:
            found = f"step {step} is not there" if step is not None else "every checkpoint is damaged"
            raise CheckpointError(
                f"{self.directory}: {found}; complete: {self.steps()}, set aside: {aside}. "
                "To start anew, move the folder away or choose another run folder."
            )
        return None

    def _candidate(self, step: int | None, skip: set[int]) -> int | None:
        """The step to try, as the lead sees the disk."""
        there = [s for s in self.steps() if s not in skip and step in (None, s)]
        chosen = there[-1] if there else -1
        if hosts.process_count() > 1:
            chosen = int(multihost_utils.broadcast_one_to_all(np.int32(chosen)))
        return chosen if chosen >= 0 else None

    def _verify(self, folder: Path) -> tuple[dict[str, Any] | None, str]:
        """The manifest if all files are as they were saved, else None and the damage. Processes share the hashing."""
        body, damage = None, ""
        try:
            body = manifest.read(folder)
            manifest.verify(folder, body, hosts.process_index(), hosts.process_count())
        except manifest.Damage as e:
            body, damage = None, str(e)
        if hosts.process_count() > 1 and multihost_utils.process_allgather(np.int32(body is None)).any():
            body, damage = None, damage or "another process found damage"
        return body, damage

    def _load(self, folder: Path, body: dict[str, Any], wanted: State, partial: bool) -> Restored:
        try:
            with _context(partial):
                state = ocp.load(str(folder), wanted)
        except Exception as e:
            raise CheckpointError(f"{folder}: its files are as they were saved, but Orbax cannot load them: {e}") from e
        self._saved = None
        return Restored(step=body["step"], state=state, position=body["position"], meta=body["meta"])  # pyright: ignore

    def _finish(self, response: Any, saving: Path, body: dict[str, Any]) -> None:
        """Runs beside the training: waits for Orbax on all processes, then the lead seals and names the step."""
        try:
            response.result()
            if self._lead:
                manifest.seal(saving, body)
                final = saving.with_suffix("")
                if final.exists():
                    self._delete(final)
                saving.rename(final)
                self._delete_old()
            self._saved, self.failures = body["step"], 0
        except Exception as e:
            self._fail(body["step"], e)

    def _fail(self, step: int, error: Exception) -> None:
        self._saved, self.failures, self.failure = None, self.failures + 1, _as_the_system_says(error)
        if not self._quiet:
            reason = printable(" ".join(str(error).split()), 300)
            console.print(f"checkpoint {step} was not saved: {type(error).__name__}: {reason}", style="bold red")
            console.print(f"The run goes on; complete: {self.steps()}, failed in a row: {self.failures}.")
        if self._lead:
            _remove(self.directory.glob(f"{step}.saving*"))

    def _delete_old(self) -> None:
        every = self._settings.keep_every
        for step in self.steps()[: -self._settings.keep]:
            if every is None or step % every:
                self._delete(self.directory / str(step))

    def _delete(self, folder: Path) -> None:
        # Renamed first: a kill in the middle must not leave half a step under a step's name.
        doomed = folder.with_name(f"{folder.name}.deleting")
        _remove([doomed])
        folder.rename(doomed)
        _remove([doomed])

    def _clean(self) -> None:
        _remove(p for p in self.directory.iterdir() if ".saving" in p.name or p.name.endswith(".deleting"))
        for folder in sorted(self.directory.iterdir()):
            if folder.name.isdecimal() and not (folder / manifest.NAME).is_file():
                console.print(f"checkpoint {folder.name} has lost its {manifest.NAME}", style="bold red")
                _set_aside(folder)


def check_path(directory: Path) -> None:
    """ConfigError where Orbax would take the path for a pattern: it then writes no arrays, and says nothing."""
    if found := sorted(set("*?[") & set(str(directory.absolute()))):
        raise config.ConfigError(
            f"{directory}: no checkpoint can be written under a path with {' or '.join(found)}; give another folder."
        )


def _as_the_system_says(error: Exception) -> Exception:
    """The OSError that Orbax met, which it tells as text."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return error if code is None else OSError(int(code[1]), os.strerror(int(code[1])))


def _context(partial: bool = False) -> ocp.Context:
    context = ocp.Context()
    # Weights hardly compress (the low bits are noise), and shardings are always given at load.
    context.array.saving.use_compression = False
    context.array.saving.enable_write_sharding_file = False
    context.array.saving.array_metadata_store = None
    context.pytree.loading.partial_load = partial
    return context


def _placed(leaf: Any) -> Any:
    if getattr(leaf, "sharding", None) is not None or not hasattr(leaf, "dtype"):
        return leaf
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=first)


def _compare(folder: Path, saved: dict[str, str], asked: dict[str, str]) -> None:
    names = sorted(k for k in saved.keys() | asked.keys() if saved.get(k) != asked.get(k))
    if names:
        lines = [f"  {k}: saved {saved.get(k, 'nothing')}, this run has {asked.get(k, 'nothing')}" for k in names]
        more = [f"  and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
        raise CheckpointError(
            f"{folder} is of another config: {len(names)} of {len(saved.keys() | asked.keys())} arrays differ\n"
            + "\n".join(lines[:LISTED] + more)
            + "\nContinue with the config it was saved with, or choose another run folder."
        )


def _tree(state: State) -> dict[str, str]:
    try:
        return manifest.tree(state)
    except ValueError as e:
        raise CheckpointError(str(e)) from e


def _set_aside(folder: Path) -> None:
    number = 1
    while (target := folder.with_name(f"{folder.name}.corrupt-{number}")).exists():
        number += 1
    folder.rename(target)
    console.print(f"{printable(str(folder))} was renamed {target.name}", style="bold red")


def _remove(folders: Iterable[Path]) -> None:
    for folder in list(folders):
        shutil.rmtree(folder, ignore_errors=True)
