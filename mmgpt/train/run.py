"""A run as a config, the objects it is built into, and a finished run opened again for inference."""

import contextlib
import dataclasses
import fcntl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmgpt.core import config
from mmgpt.core.config import ConfigError
from mmgpt.core.log import console, write_atomic
from mmgpt.data.loader import Rows, RowsConfig
from mmgpt.data.mixture import Change
from mmgpt.dist import axes as rules
from mmgpt.dist import hosts
from mmgpt.dist.hosts import Hosts
from mmgpt.dist.mesh import Mesh
from mmgpt.models import ModelConfig, VisionConfig
from mmgpt.objectives.objective import Objective, ObjectiveConfig
from mmgpt.tokens.grammars.emu3 import Emu3
from mmgpt.tokens.grammars.grammar import Grammar, GrammarConfig
from mmgpt.tokens.text import TextTokenizer
from mmgpt.train import state as states
from mmgpt.train.checkpoint import Checkpoints
from mmgpt.train.optimizer import Optimizer
from mmgpt.train.skips import Skips
from mmgpt.train.spikes import Spikes
from mmgpt.train.state import Structure
from mmgpt.train.weights import are_alone, restore_weights


class Tokens(config.Config):
    """What turns documents into ids: a grammar, the text tokenizer's file or folder, the image tokenizer's folder.

    Where the sizes of the `codebooks` are given, the image tokenizer need not be there to lay documents out.
    """

    grammar: GrammarConfig = Emu3.Config()
    text: str = ""
    vision: str = ""
    codebooks: tuple[int, ...] = ()

    def build(self) -> Grammar:
        """The grammar; TextError, GrammarError or ConfigError when a tokenizer is missing or of another model."""
        if self.codebooks:
            return self.grammar.build(TextTokenizer.load(Path(self.text)), self.codebooks)
        vision = load_run(Path(self.vision)).model
        if not isinstance(vision, VisionConfig):
            raise ConfigError(f"tokens.vision={self.vision}: that run trains no image tokenizer; name one that does.")
        return self.grammar.build(TextTokenizer.load(Path(self.text)), vision.codebooks, blanks=vision.blanks)


class Run(config.Config):
    """One training run: everything but the folder it writes to.

    `tokens` is None where the model does not read ids. `ema` is the decay of a moving average of the parameters,
    which inference then uses. A batch goes through the model in `microbatches` parts, whose gradients are added up.
    `samples` prompts are drawn at every evaluation. Every `replay_every` steps a step is done twice and compared, to
    find devices that compute wrongly in silence; None for never. Every `export_every` steps the model is written in
    Hugging Face's format too, to `exports/STEP` in the run folder.
    """

    model: ModelConfig
    objective: ObjectiveConfig
    data: RowsConfig
    tokens: Tokens | None = None
    optimizer: Optimizer.Config = Optimizer.Config()
    mesh: Mesh.Config = Mesh.Config()
    checkpoint: Checkpoints.Config = Checkpoints.Config()
    steps: int = 1000
    microbatches: int = 1
    seed: int = 0
    ema: float | None = None
    log_every: int = 10
    evaluate_every: int = 250
    held_out_batches: int = 4
    save_every: int = 250
    samples: int = 4
    export_every: int | None = None
    spikes: Spikes.Config = Spikes.Config()
    replay_every: int | None = 500
    hosts: Hosts.Config = Hosts.Config()


def load_run(run_dir: Path) -> Run:
    """The config of a run folder; ConfigError when it holds none."""
    run = config.load(run_dir / "config.json")
    if not isinstance(run, Run):
        raise ConfigError(f"{run_dir}/config.json is not the config of a training run.")
    return run


CHANGEABLE = (
    "steps",
    "microbatches",
    "mesh.",
    "log_every",
    "evaluate_every",
    "held_out_batches",
    "save_every",
    "samples",
    "export_every",
    "spikes.",
    "replay_every",
    "hosts.",
    "checkpoint.",
    "data.threads",
    "data.prefetch",
    "data.cache_bytes",
    "data.workers",
    "data.max_rejected",
)
"""Leaves that may differ when a run goes on: what a run learns from is the same. More `steps` stretch the schedule."""


@dataclasses.dataclass(frozen=True)
class Built:
    """A run's objects; they live inside `jax.set_mesh(mesh)`."""

    run: Run
    mesh: jax.sharding.Mesh
    grammar: Grammar | None
    structure: Structure
    objective: Objective
    optimizer: Optimizer


def check(run: Run) -> None:
    """ConfigError, or the LoaderError of its data, on numbers that make no run."""
    least = {
        "steps": 1,
        "microbatches": 1,
        "log_every": 1,
        "evaluate_every": 1,
        "save_every": 1,
        "held_out_batches": 1,
        "samples": 0,
    }
    values = {name: (getattr(run, name), low) for name, low in least.items()}
    values["mesh.cpu_devices"] = run.mesh.cpu_devices, 1
    if isinstance(run.model, VisionConfig):
        values["model.patch"] = run.model.patch, 1
    for name, every in {"export_every": run.export_every, "replay_every": run.replay_every}.items():
        if every is not None:
            values[name] = every, 1
    values |= {f"hosts.{name}": (value, 2) for name, value in vars(run.hosts).items()}
    for name, (value, low) in values.items():
        if value < low:
            raise ConfigError(f"{name} is {value}; it must be at least {low}.")
    run.data.check()
    run.optimizer.build(run.steps)
    if run.ema is not None and not 0 < run.ema < 1:
        raise ConfigError(f"ema is {run.ema}; it is the decay of an average, between 0 and 1.")
    if isinstance(run.model, VisionConfig):
        for name in ("height", "width"):
            size = vars(run.data).get(name, 0)
            if size % run.model.patch:
                raise ConfigError(
                    f"data.{name} {size} is not a multiple of the model's patch of "
                    f"{run.model.patch} pixels; change one of them."
                )


def build(run: Run) -> Built:
    """Builds everything but the data. Model and objective are fitted to the grammar's vocabulary first."""
    check(run)
    grammar = run.tokens.build() if run.tokens is not None else None
    model, objective = run.model, run.objective
    if grammar is not None:
        model, objective = model.fit(grammar.vocabulary), objective.fit(grammar.vocabulary)
        _check_ids(model, objective, grammar)
    mesh = run.mesh.build()
    with jax.set_mesh(mesh):
        structure = Structure(objective.trained(model), run.seed)
    return Built(run, mesh, grammar, structure, objective.build(), run.optimizer.build(run.steps))


def _check_ids(model: ModelConfig, objective: ObjectiveConfig, grammar: Grammar) -> None:
    """ConfigError where a model's ids, as its config names them, are not those of the grammar over this tokenizer."""
    used = grammar.vocabulary.used
    rows, ids = vars(model).get("vocab", used), vars(objective).get("vocab", used)
    if rows < used or ids != used:
        raise ConfigError(
            f"the {grammar.name} grammar over its text tokenizer has {used} ids, but the model is of {ids} ids and has "
            f"{rows} rows: it was not trained with this grammar, or the tokenizer is of another model. Give "
            "tokens.text and tokens.grammar as they were."
        )


def build_rows(built: Built, run_dir: Path | None, skips: Skips | None = None) -> Rows:
    """The loader of all rows the run will see or skip; bad samples are listed in `run_dir`, or nowhere."""
    run = built.run
    ways = rules.ways("batch", built.mesh)
    parts = ways * run.microbatches
    if run.data.batch_rows % parts:
        raise ConfigError(
            f"data.batch_rows {run.data.batch_rows} does not divide over {ways} devices in microbatches="
            f"{run.microbatches}; give a multiple of {parts}, or another mesh."
        )
    count = (skips or Skips(run.data.batch_rows)).rows(run.steps)
    return run.data.build(built.grammar, seed=run.seed, rows=count, folder=run_dir)


def _begun(run_dir: Path) -> bool:
    """Whether a step was taken there; a run that failed before may be tried again with another config."""
    told = run_dir / "metrics.jsonl"
    return (told.exists() and told.stat().st_size > 0) or any(step != "0" for step in _steps_saved(run_dir))  # 0: none


def _steps_saved(run_dir: Path) -> list[str]:
    return [path.name for path in (run_dir / "checkpoints").glob("[0-9]*")]


def changes(run: Run) -> tuple[Change, ...]:
    """The later mixtures of a run's data."""
    return vars(run.data).get("changes", ())


def _changes(run: Run, batch: int) -> list[Change]:
    """Those that begin before a batch: rows were drawn by them."""
    return [change for change in changes(run) if change.step < batch]


@contextlib.contextmanager
def alone(run_dir: Path) -> Iterator[None]:
    """Holds the run folder against a second training process; ConfigError where one is at work."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise ConfigError(
                f"{run_dir}: another process trains there. Wait for it, or give another --run-dir."
            ) from e
        except OSError:
            pass  # a file system without locks
        yield


def goes_on(run: Run, run_dir: Path) -> bool:
    """Whether the folder holds this run already; ConfigError when it holds one of another config."""
    path = run_dir / "config.json"
    if not path.exists():
        return False
    before = config.load(path)
    step = max([int(name) for name in _steps_saved(run_dir) if name.isdigit()], default=0)
    saved = Skips.load(run_dir, run.data.batch_rows).row(step) // run.data.batch_rows  # those left out were drawn too
    later = _changes(run, saved) == _changes(before, saved)
    free = (*CHANGEABLE, "data.changes") if later else CHANGEABLE
    changed = {key: pair for key, pair in config.difference(run, before).items() if not key.startswith(free)}
    if changed and _begun(run_dir):
        lines = "\n".join(f"  {key}: {old!r} there, {new!r} asked" for key, (old, new) in changed.items())
        more = "" if later else f" A new mixture may begin at step {saved}, where the last one saved is, or later."
        raise ConfigError(
            f"{run_dir} holds a run of another config:\n{lines}\nGive another --run-dir, or the config as it was.{more}"
        )
    return _begun(run_dir)


def record(run: Run, run_dir: Path, going_on: bool) -> None:
    """Writes config, command line and, of a run that begins, the code's version; called once the run can start.

    A config that cannot run must not take the place of one that could.
    """
    if not hosts.is_lead():
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomic(run_dir / "config.json", config.to_json(run))
    with open(run_dir / "command.txt", "a") as f:
        f.write(" ".join(sys.argv) + "\n")
    if not going_on:
        for name, command in {
            "commit.txt": ["git", "rev-parse", "HEAD"],
            "diff.patch": ["git", "diff", "HEAD"],
        }.items():
            try:
                done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, check=False)
            except OSError:
                break  # no git here
            if done.returncode == 0:
                write_atomic(run_dir / name, done.stdout)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A trained model for inference, inside `jax.set_mesh(built.mesh)`: `params` are the averaged ones if kept."""

    built: Built
    step: int
    params: Any
    variables: Any


def for_inference(opened: Opened) -> Opened:
    """The same where no two devices share a row, which decoding one id at a time cannot: those become replicas.

    No array moves, since weights do not lie over the context axis.
    """
    mesh = opened.built.mesh
    sizes = mesh.shape
    if sizes["context"] == 1:
        return opened
    whole = (sizes["replica"] * sizes["context"], sizes["fsdp"], 1, sizes["tensor"])
    devices = np.moveaxis(mesh.devices, 2, 1).reshape(whole)
    apart = jax.sharding.Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)

    def moved(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.device_put(x, jax.NamedSharding(apart, x.sharding.spec)), tree)

    built = dataclasses.replace(opened.built, mesh=apart)
    return dataclasses.replace(opened, built=built, params=moved(opened.params), variables=moved(opened.variables))


def open_run(run_dir: Path, step: int | None = None) -> Opened:
    """Loads a run folder's newest (or given) checkpoint; ConfigError or CheckpointError say what is missing."""
    # Inference takes the devices that are there, whatever the run was trained on.
    run = load_run(run_dir)
    run = run.replace(mesh=Mesh.Config(cpu_devices=run.mesh.cpu_devices))
    built = build(run)
    alone = without_training_parts(built)
    with jax.set_mesh(built.mesh), run.checkpoint.build(run_dir / "checkpoints", read_only=True) as checkpoints:
        if are_alone(checkpoints, step):
            opened = Opened(alone, 0, *restore_weights(checkpoints, alone.structure, step))
        else:
            opened = _trained(checkpoints, built, alone, step)
    if opened is None:
        raise ConfigError(f"{run_dir} has no complete checkpoint; train it first with `mmgpt train {run_dir}`.")
    console.print(f"opened {run_dir} at step {opened.step}")
    return opened


def _trained(checkpoints: Checkpoints, built: Built, alone: Built, step: int | None) -> Opened | None:
    """What a training run saved, of it the model's own arrays; None where it saved nothing yet."""
    ema = built.run.ema is not None
    whole = states.abstract(built.structure, built.optimizer, ema)
    weights = "ema" if ema else "params"
    only = ("variables", weights) if jax.tree.leaves(whole["variables"]) else (weights,)
    restored = checkpoints.restore(whole, step, only=only)
    if restored is None:
        return None
    params, variables = alone.structure.abstract()
    found = whole | restored.state
    return Opened(alone, restored.step, _within(params, found[weights]), _within(variables, found["variables"]))


def without_training_parts(built: Built) -> Built:
    """The same with the model's own structure, without the parts that only training needs."""
    run, grammar = built.run, built.grammar
    model = run.model if grammar is None else run.model.fit(grammar.vocabulary)
    with jax.set_mesh(built.mesh):
        return dataclasses.replace(built, structure=Structure(model.build, run.seed))


def _within(wanted: Any, found: Any) -> Any:
    """Those of the found arrays whose names are wanted."""
    return {name: _within(part, found[name]) for name, part in wanted.items()} if isinstance(wanted, dict) else found
