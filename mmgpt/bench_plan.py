"""`mmgpt bench plan`: the planner held against speeds that others measured on TPUs and published.

Each row is a run of MaxText whose model, batch, length and topology a preset of `configs/published.py` has. What is
planned is our program for it, which is not theirs: other kernels, another choice of what the backward pass keeps. So a
row tells what a schedule of the compiler's estimates is worth on a generation of chips, not how fast MaxText is.

One difference is known and can be told apart, the attention kernel: a second figure has the time of theirs, splash
attention, in place of ours. Nothing else is corrected.
"""

import dataclasses
import math
from pathlib import Path

from rich.table import Table

from mmgpt import presets
from mmgpt.core.config import ConfigError
from mmgpt.core.errors import UsageError
from mmgpt.core.log import check_writable, console, show, write_json
from mmgpt.data.loader import PackedRows
from mmgpt.models.decoder import Decoder
from mmgpt.plan import report
from mmgpt.train.run import Run

RECIPES = "github.com/AI-Hypercomputer/tpu-recipes, training/"
WITHIN = 0.2
"""How far a planned speed may lie from the measured one before its row is red."""

SPLASH = {"v5p": (0.869, 0.988), "v6e": (0.318, 0.439), "v7x": (0.280, 0.340)}
"""By target: the share of the peak that splash attention reaches forward and backward in causal blocks of 1,024 queries
and keys, heads of 128. v5p and v6e: by its schedule, as `mmgpt bench attention` reads it; v7x: tokamax's, measured in
rows of 8,192 (its microbenchmarks.pdf of 2025-11-13: 24.9 and 30.2 % over visible pairs)."""
BLOCK = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """A published run: tokens a second and chip."""

    preset: str
    topology: str
    tokens: float
    source: str


ROWS = (
    Measured(
        preset="llama3_8b_v6e_256",
        topology="v6e:16x16",
        tokens=7207,
        source=f"{RECIPES}trillium/Llama3.1-8B-MaxText/v6e-256",
    ),
    Measured(
        preset="llama3_70b_v6e_256",
        topology="v6e:16x16",
        tokens=960,
        source=f"{RECIPES}trillium/Llama3.1-70B-MaxText/v6e-256",
    ),
    Measured(
        preset="mistral_7b_v6e_8",
        topology="v6e:2x4",
        tokens=7777,
        source=f"{RECIPES}trillium/Mistral-7B-MaxText",
    ),
    Measured(
        preset="llama3_70b_v7x_64",
        topology="tpu7x:4x4x4",
        tokens=2687,
        source=f"{RECIPES}ironwood/llama3.1-70b/8k-bf16-tpu7x-4x4x4",
    ),
    Measured(
        preset="llama3_405b_v7x_256",
        topology="tpu7x:4x8x8",
        tokens=500,
        source=f"{RECIPES}ironwood/llama3.1-405b/8k-bf16-tpu7x-4x8x8",
    ),
    Measured(
        preset="llama3_405b_v5p_512",
        topology="v5p:8x8x8",
        tokens=124.6,
        source=f"{RECIPES}v5p/Llama3.1-405B-MaxText",
    ),
    Measured(
        preset="llama2_70b_v5p_256",
        topology="v5p:4x8x8",
        tokens=692,
        source="MaxText, docs/reference/models/tiering.md and configs/v5p/llama2_70b.sh",
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
    """A row with what the plan says: tokens a second and chip, and useful operations as a share of the peak's.

    `splash`: tokens a second and chip with the time of splash attention.
    """

    row: Measured
    planned: float
    utilisation: float
    splash: float

    @property
    def deviations(self) -> tuple[float, float]:
        """Of the planned speeds, with our attention and with splash, from the measured one, as shares of it."""
        return self.planned / self.row.tokens - 1.0, self.splash / self.row.tokens - 1.0


def bench_plan(only: tuple[str, ...] | None = None, json: Path | None = None) -> None:
    """Plans published runs and compares their speed with the one that was measured. Each row compiles for minutes.

    Args:
        only: presets, by default all.
        json: write the figures.
    """
    rows = ", ".join(row.preset for row in ROWS)
    if only == ():
        raise UsageError(f"--only names no preset: one of {rows}; without --only all of them.")
    unknown = sorted(set(only or ()) - {row.preset for row in ROWS})
    if unknown:
        raise ConfigError(f"--only {' '.join(unknown)}: one of {rows}.")
    check_writable(json)
    found = []
    for row in ROWS:
        if only is not None and row.preset not in only:
            continue
        found.append(compared(row))
        show(_table(found[-1:]))  # at once: the next one may take long, or not fit
    if len(found) > 1:
        show(_table(found))
    if json is not None:
        write_json(json, [dataclasses.asdict(c) | {"deviations": c.deviations} for c in found])


def compared(row: Measured) -> Compared:
    """One row, planned."""
    run = presets.preset(row.preset)
    assert isinstance(run, Run)
    with console.status(f"compiling {row.preset} for {row.topology}"):
        made = report.plan(run, row.topology, documents="one")
    planned = made.numbers()["tokens_a_second_and_chip"]
    splash = planned * made.told.seconds / with_splash(made, run)
    return Compared(row=row, planned=planned, utilisation=made.utilisation, splash=splash)


def with_splash(made: report.Plan, run: Run) -> float:
    """Seconds of a planned step of causal rows with splash attention's time in place of our kernels'."""
    model, data, shards = run.model, run.data, dict(made.compiled.mesh.shape)
    assert isinstance(model, Decoder.Config) and isinstance(data, PackedRows.Config)
    rows = data.batch_rows // (shards["replica"] * shards["fsdp"] * run.microbatches)
    blocks = math.comb(-(-data.row_length // BLOCK) + 1, 2)
    product = 2.0 * blocks * BLOCK**2 * model.head_dim * model.heads // shards["tensor"] * rows
    shares = SPLASH[made.chip.target]
    forward, backward = (n * product / (made.chip.peak * share) for n, share in zip((2, 5), shares, strict=True))
    seconds = made.told.seconds
    for (phase, what), ours in made.told.by_part.items():
        if what == "attention":
            theirs = backward / made.attention.backward if phase == "backward" else forward / made.attention.forward
            seconds += ours * (theirs - 1.0)
    return seconds


def _table(found: list[Compared]) -> Table:
    table = Table(
        "run",
        "topology",
        "measured",
        "planned",
        "of the peak",
        "deviation",
        "with splash",
        "deviation",
        title="tokens a second and chip",
    )
    for c in found:
        ours, splash = c.deviations
        style = None if abs(splash) <= WITHIN else "red"
        numbers = (f"{c.row.tokens:,.0f}", f"{c.planned:,.0f}", f"{c.utilisation:.1%}", f"{ours:+.1%}")
        table.add_row(c.row.preset, c.row.topology, *numbers, f"{c.splash:,.0f}", f"{splash:+.1%}", style=style)
    return table
