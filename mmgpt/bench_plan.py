"""`mmgpt bench plan`: the planner held against speeds that others measured on TPUs and published.

Each row is a run of MaxText whose model, batch, length and topology a preset of `configs/published.py` has. What is
planned is our program for it, which is not theirs: other kernels, another choice of what the backward pass keeps. So a
row tells what a schedule of the compiler's estimates is worth on a generation of chips, not how fast MaxText is. No
factor is applied.
"""

import dataclasses
from pathlib import Path

from rich.table import Table

from mmgpt import presets
from mmgpt.core.config import ConfigError
from mmgpt.core.log import check_writable, console, show, write_json
from mmgpt.plan import report
from mmgpt.train.run import Run

RECIPES = "github.com/AI-Hypercomputer/tpu-recipes, training/"
WITHIN = 0.2
"""How far a planned speed may lie from the measured one before its row is red."""


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
    """A row with what the plan says: tokens a second and chip, and useful operations as a share of the peak's."""

    row: Measured
    planned: float
    utilisation: float

    @property
    def deviation(self) -> float:
        """Of the planned speed from the measured one, as a share of it."""
        return self.planned / self.row.tokens - 1.0


def bench_plan(only: tuple[str, ...] = (), json: Path | None = None) -> None:
    """Plans published runs and compares their speed with the one that was measured. Each row compiles for minutes.

    Args:
        only: presets, by default all.
        json: write the figures.
    """
    unknown = sorted(set(only) - {row.preset for row in ROWS})
    if unknown:
        raise ConfigError(f"--only {' '.join(unknown)}: one of {', '.join(row.preset for row in ROWS)}.")
    if json is not None:
        check_writable(json)
    found = []
    for row in ROWS:
        if only and row.preset not in only:
            continue
        found.append(compared(row))
        show(_table(found[-1:]))  # at once: the next one may take long, or not fit
    if len(found) > 1:
        show(_table(found))
    if json is not None:
        write_json(json, [dataclasses.asdict(c) | {"deviation": c.deviation} for c in found])


def compared(row: Measured) -> Compared:
    """One row, planned."""
    run = presets.preset(row.preset)
    assert isinstance(run, Run)
    with console.status(f"compiling {row.preset} for {row.topology}"):
        made = report.plan(run, row.topology, documents="one")
    return Compared(row=row, planned=made.numbers()["tokens_a_second_and_chip"], utilisation=made.utilisation)


def _table(found: list[Compared]) -> Table:
    table = Table(
        "run", "topology", "measured", "planned", "of the peak", "deviation", title="tokens a second and chip"
    )
    for c in found:
        style = None if abs(c.deviation) <= WITHIN else "red"
        numbers = (f"{c.row.tokens:,.0f}", f"{c.planned:,.0f}", f"{c.utilisation:.1%}")
        table.add_row(c.row.preset, c.row.topology, *numbers, f"{c.deviation:+.1%}", style=style)
    return table
