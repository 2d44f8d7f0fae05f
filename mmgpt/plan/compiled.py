"""The real training step of a run, compiled for devices that are not there."""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from mmgpt.core.config import ConfigError
from mmgpt.data.loader import PackedRows
from mmgpt.data.row import assemble, stacked
from mmgpt.dist import axes as rules
from mmgpt.models.decoder import Decoder
from mmgpt.objectives.next_token import NextToken
from mmgpt.plan import memory
from mmgpt.plan.chips import Chip
from mmgpt.plan.hlo import Program, parse
from mmgpt.plan.memory import Memory
from mmgpt.train import state as states
from mmgpt.train.run import Run, check
from mmgpt.train.state import Structure
from mmgpt.train.step import make_step, placed_shapes

TOO_LARGE = ("RESOURCE_EXHAUSTED", "Ran out of memory")


class TooLarge(ConfigError):
    """A step that does not fit the memory of a chip."""


class Weight(NamedTuple):
    """A parameter: its shape, and the shape of the part that each device holds at rest."""

    name: str
    shape: tuple[int, ...]
    part: tuple[int, ...]
    bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """A compiled step: its program, its memory, the mesh, and the run with its model fitted to a vocabulary."""

    run: Run
    mesh: jax.sharding.Mesh
    program: Program
    memory: Memory
    weights: tuple[Weight, ...]
    seconds: float
    """What compiling took."""


def fitted(run: Run) -> Run:
    """The run with the sizes that a vocabulary sets; ConfigError where its tokenizers are needed and not there."""
    if not isinstance(run.model, Decoder.Config) or not isinstance(run.data, PackedRows.Config):
        raise ConfigError("a plan is of a decoder that trains on packed rows; this run is neither.")
    check(run)
    if run.model.vocab == 0:
        if run.tokens is None:
            raise ConfigError("model.vocab is 0 and the run has no tokens; give --model.vocab.")
        vocabulary = run.tokens.build().vocabulary
        return run.replace(model=run.model.fit(vocabulary), objective=run.objective.fit(vocabulary))
    objective = run.objective
    if isinstance(objective, NextToken.Config) and objective.vocab == 0:
        objective = objective.replace(vocab=run.model.vocab)  # padded rows or not: the program is as large
    if isinstance(objective, NextToken.Config) and objective.vocab > run.model.vocab:
        raise ConfigError(
            f"objective.vocab is {objective.vocab}, and the model has {run.model.vocab} rows; give it as many."
        )
    return run.replace(objective=objective)


def compiled(run: Run, devices: Sequence[Any], chip: Chip, options: dict[str, str] | None = None) -> Compiled:
    """Compiles a fitted run's step for `devices`. TooLarge where a chip's memory does not hold it.

    `options` are for the compiler, besides those of the run's devices.
    """
    import time

    assert isinstance(run.model, Decoder.Config) and isinstance(run.data, PackedRows.Config)
    mesh = run.mesh.build(devices)
    ways = rules.ways("batch", mesh) * run.microbatches
    if run.data.batch_rows % ways:
        raise ConfigError(
            f"data.batch_rows {run.data.batch_rows} is no multiple of the mesh's {ways // run.microbatches} parts x "
            f"microbatches={run.microbatches}; give --data.batch-rows or --microbatches."
        )
    row = stacked([assemble([], run.data.row_length, 0)])
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        structure, optimizer = Structure(run.objective.trained(run.model), run.seed), run.optimizer.build(run.steps)
        step = make_step(
            structure, run.objective.build(), optimizer, seed=run.seed, ema=run.ema, microbatches=run.microbatches
        )
        state = states.abstract(structure, optimizer, run.ema is not None)
        batch = placed_shapes(row, run.data.batch_rows)
        begin = time.perf_counter()
        try:
            made = step.lower(state, batch).compile(compiler_options={"xla_dump_to": folder, **(options or {})})
        except jax.errors.JaxRuntimeError as e:
            if any(word in str(e) for word in TOO_LARGE):
                raise TooLarge(f"the step does not fit a chip: {_said(str(e))}") from e
            raise
        seconds = time.perf_counter() - begin
        text, stats = made.as_text(), made.memory_analysis()
        assert text is not None and stats is not None
        program = parse(text)
        found = memory.read(
            Path(folder),
            program,
            held=memory.held(state, batch),
            temporary=stats.temp_size_in_bytes,
            limit=chip.memory,
            layers=run.model.layers,
            state=state,
        )
    weights = tuple(
        Weight(
            jax.tree_util.keystr(path, simple=True, separator="/"),
            leaf.shape,
            leaf.sharding.shard_shape(leaf.shape),
            leaf.size * leaf.dtype.itemsize,
        )
        for path, leaf in jax.tree.leaves_with_path(state["params"])
    )
    return Compiled(run=run, mesh=mesh, program=program, memory=found, weights=weights, seconds=seconds)


def _said(message: str) -> str:
    """The sentence of the compiler's message that tells how much was too much."""
    lines = [line.strip() for line in message.splitlines() if "emory" in line or "hbm" in line.lower()]
    return (lines[0] if lines else message)[:300]
