"""Checkpoints that are whole or absent, in a folder that all processes see, and more often on each host itself.

`tier.py` has the folders and what makes a step whole, `arrays.py` and `shards.py` what lies in them, `manifest.py` the
hashes. Here is which step is saved where, and which is loaded: the newest one that is whole and fits on all processes.
"""

import dataclasses
import functools
import hashlib
import os
import secrets
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from mmgpt.core import config
from mmgpt.core.errors import UserError
from mmgpt.core.log import console, printable, write_atomic
from mmgpt.dist import hosts
from mmgpt.dist.agreement import Elsewhere, agree, together
from mmgpt.train import manifest
from mmgpt.train.arrays import State, check_path
from mmgpt.train.manifest import Damage
from mmgpt.train.tier import Local, Shared, Tier

LISTED = 12
"""Differing leaves that an error names before it only counts the rest."""

IDENTITY = "identity"
"""File beside the steps that tells this run's local checkpoints from those of another one at the same path."""
TRIES = 20
"""How often a reader whose step is deleted under it takes a newer one."""


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
    """The checkpoints of a run.

    Every process calls every method but `steps`, in the same order. Use it as a context manager, or call `close`: a
    save still in flight when the interpreter exits is lost.
    """

    class Config(config.Config):
        """`keep` most recent steps stay, and for good those that `keep_every` divides.

        `local` is a folder of each host, on a RAM disk or an SSD, for a step more every `local_every`, of which the
        newest `local_keep` stay. A restart takes the newest step of both, and without its hosts does not need them.
        """

        keep: int = 3
        keep_every: int | None = None
        asynchronous: bool = True
        local: str = ""
        local_every: int = 50
        local_keep: int = 2

        def build(self, directory: Path, *, read_only: bool = False, quiet: bool = False) -> "Checkpoints":
            """Opens the folder. A reader beside a living run must be `read_only`: others clean up what a kill left.

            With `quiet` it is the caller who tells that a save failed.
            """
            least = {"keep": 2, "keep_every": 1, "local_every": 1, "local_keep": 2}  # one to walk back to
            for name, value in vars(self).items():
                if name in least and value is not None and value < least[name]:
                    raise config.ConfigError(f"checkpoint.{name} is {value}; it must be at least {least[name]}.")
            if not read_only:
                check_path(directory)
            return Checkpoints(self, Path(directory), read_only, quiet)

    def __init__(self, settings: Config, directory: Path, read_only: bool, quiet: bool) -> None:
        self.directory = directory.absolute()
        self._settings = settings
        self._read_only = read_only
        self._saving = threading.RLock()
        """Held by whoever starts a save or waits for one: the training loop, or what ends the process beside it."""
        self._shared = Shared(self.directory, keep=settings.keep, keep_every=settings.keep_every, quiet=quiet)
        self._local: Local | None = None
        if not read_only:
            together("open checkpoints", self._shared.clean)
            if settings.local:
                self._local = Local(self._own_folder(), keep=settings.local_keep)
                together("open local checkpoints", self._local.clean)
        self._tiers: list[Tier] = [tier for tier in (self._local, self._shared) if tier is not None]

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def failures(self) -> int:
        """Saves that failed since the last one that succeeded, without local ones."""
        return self._shared.failures

    @property
    def failure(self) -> Exception | None:
        """What the last of them met."""
        return self._shared.failure

    def steps(self) -> list[int]:
        """Complete steps in the folder that all processes see, oldest first."""
        return self._shared.steps()

    def known(self) -> list[int]:
        """Complete steps of both folders, oldest first."""
        self.wait()
        return sorted({step for tier in self._tiers for step in tier.common()})

    def save(self, step: int, state: State, position: int, meta: dict[str, Any]) -> None:
        """Saves a nested dict of arrays with the next global row and plain JSON `meta`; replaces the step if it exists.

        Returns once the arrays are copied to the host, so that they may be donated; `wait` says how it went. A save
        that fails is told on the console and counted in `failures`, and neither the run nor the next save minds.
        """
        self._save(self._shared, step, state, position, meta)

    def is_local(self, step: int) -> bool:
        """Whether a step is to be saved on each host: there is a `local` folder, and `local_every` divides it."""
        return self._local is not None and step % self._settings.local_every == 0

    def save_last(self, step: int, state: State, position: int, meta: dict[str, Any]) -> bool:
        """Saves and waits, whatever another thread is doing here or will not come to; whether it is saved.

        Where the step was saved already with other meta, that stays. A local save in flight is not waited for.
        """
        with self._saving:
            self._save(self._shared, step, state, position, meta)
            return self._shared.wait()

    def save_local(self, step: int, state: State, position: int, meta: dict[str, Any]) -> None:
        """The same on each host, if the step `is_local`."""
        if self._local is not None and self.is_local(step):
            self._save(self._local, step, state, position, meta)

    def wait(self) -> bool:
        """Waits for the saves in flight; whether the last `save` succeeded."""
        with self._saving:
            for tier in self._tiers:
                tier.wait()
        return self.failures == 0

    def close(self) -> None:
        """Waits for the saves in flight."""
        self.wait()

    def set_aside(self, what: str, chosen: Callable[[Description], bool]) -> None:
        """Renames `7.WHAT-1` the steps that are `chosen`, as WHAT "abandoned"; those of an earlier call are deleted."""
        self.wait()
        for tier in self._tiers:
            steps = [step for step in tier.common() if (found := _described(tier, step)) is not None and chosen(found)]
            if steps:
                together(f"remove {what}", functools.partial(tier.remove_aside, what))
                together(f"set aside {what}", functools.partial(tier.set_aside, steps, what))
            tier.saved = None

    def describe(self, step: int | None = None) -> Description | None:
        """What a step holds, the newest if none is named, from its manifest alone; None where there is none."""
        self.wait()
        skip: set[tuple[int, Tier]] = set()
        while (found := self._newest(step, skip)) is not None:
            if (described := _described(found[1], found[0])) is not None:
                return described
            skip.add(found)
        if step is not None:
            raise CheckpointError(f"{self.directory}: step {step} is not there; complete: {self.steps()}.")
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
        skip: set[tuple[int, Tier]] = set()
        tries = 0
        while (found := self._newest(step, skip)) is not None:
            number, tier = found
            folder = tier.directory / str(number)
            before = _identity(folder)
            try:
                restored = self._load(number, tier, wanted, only)
                if restored is not None:
                    return restored
            except (Damage, Elsewhere, CheckpointError) as e:
                if self._read_only and self._was_deleted(folder, before, tries := tries + 1):
                    continue
                if isinstance(e, CheckpointError):
                    raise
                if step is not None:
                    raise CheckpointError(f"{folder}: {e}. Choose another step of {self.steps()}.") from e
                console.print(f"checkpoint {number} is damaged ({e}); trying the one before it", style="bold red")
                if not self._read_only:
                    together("set aside", functools.partial(tier.set_aside, [number], "corrupt"))
            skip.add(found)
        aside = sorted(p.name for p in self.directory.glob("*.corrupt-*"))
        if step is not None or aside or any(tier is self._shared for _, tier in skip):
            what = f"step {step} is not there" if step is not None else "every checkpoint is damaged"
            raise CheckpointError(
                f"{self.directory}: {what}; complete: {self.steps()}, set aside: {aside}. "
                "To start anew, move the folder away or choose another run folder."
            )
        return None

    def _save(self, tier: Tier, step: int, state: State, position: int, meta: dict[str, Any]) -> None:
        if self._read_only:
            raise CheckpointError(f"{self.directory} was opened to read only; step {step} cannot be saved there.")
        body = {"step": step, "position": position, "meta": meta, "tree": _tree(state)}
        manifest.render(body)  # meta that is not plain JSON is a mistake of the caller, and raises here
        with self._saving:
            tier.save(step, state, body)
            if not self._settings.asynchronous:
                tier.wait()

    def _newest(self, step: int | None, skip: set[tuple[int, Tier]]) -> tuple[int, Tier] | None:
        """The step to try and where it lies: of the same one on both, the local one, which loads faster."""
        there = [(number, tier) for tier in self._tiers for number in tier.common() if step in (None, number)]
        return max((found for found in there if found not in skip), key=lambda found: found[0], default=None)

    def _load(self, step: int, tier: Tier, wanted: State, only: Sequence[str] | None) -> Restored | None:
        """A step, or None if it is of another mesh or other hosts and can only be loaded there; Damage, Elsewhere."""
        body = tier.verify(step)
        saved = {k: v for k, v in body["tree"].items() if only is None or k.split("/")[0] in only}
        folder = tier.directory / str(step)
        _compare(folder, saved, _tree(wanted))
        if not tier.fits(body, wanted):
            console.print(f"{folder} is of another mesh or other hosts; trying the one before it")
            return None
        try:
            state = tier.load(step, body, wanted, partial=only is not None)
        except Exception as e:
            told = printable(" ".join(str(e).split()), 300)
            raise CheckpointError(f"{folder}: its files are as they were saved, but cannot be loaded: {told}") from e
        for each in self._tiers:
            each.saved = None  # what follows may be another future
        return Restored(step=step, state=state, position=body["position"], meta=body["meta"])

    def _was_deleted(self, folder: Path, before: tuple[int, int] | None, tries: int) -> bool:
        """Whether the living run has deleted or replaced a step that was being read; CheckpointError at too many."""
        deleted = agree("checkpoint deleted", before is None or _identity(folder) != before, any)
        if deleted and tries > TRIES:
            raise CheckpointError(
                f"{self.directory}: steps are deleted faster than they can be read; raise checkpoint.keep of the run."
            )
        return deleted

    def _own_folder(self) -> Path:
        """This process's part of the local folder; the name is of this run folder alone, and gone with it."""
        path = self.directory / IDENTITY

        def known() -> str:
            if hosts.is_lead() and not path.exists():
                write_atomic(path, secrets.token_hex(16))
            return path.read_text() + str(self.directory) if hosts.is_lead() else ""

        identity = agree("run", together("run identity", known), lambda said: said[0])
        name = f"{self.directory.parent.name}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
        return Path(self._settings.local).absolute() / name / f"process-{hosts.process_index()}"


def _described(tier: Tier, step: int) -> Description | None:
    try:
        body = tier.read(step)
    except (Damage, Elsewhere):
        return None
    return Description(**{f.name: body[f.name] for f in dataclasses.fields(Description)})


def _identity(folder: Path) -> tuple[int, int] | None:
    """Changes where another folder takes this one's name."""
    try:
        found = os.stat(folder)
    except OSError:
        return None
    return found.st_ino, found.st_ctime_ns


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
