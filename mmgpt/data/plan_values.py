"""What a run will read, in numbers: fill, tokens and passes by source, by mixture and over the steps."""

import dataclasses
from typing import Any

import numpy as np

from mmgpt.data.loader import PackedRows
from mmgpt.data.mixture import Source
from mmgpt.data.pack import Plan

SPANS = 200
"""Spans of rows over which tokens are counted, at most."""
LOOK = 20_000_000
"""Documents of a plan that are looked at; of a longer one the first of each span. Totals are of all, always."""
SAMPLE = 1 << 18
"""Lengths of a source that are kept, taken evenly."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """One source of one mixture: `flag` is its config on the command line, `weight` its share of the mixture's tokens.

    `documents` and `tokens` are of an epoch; `lengths`, ascending, are a sample of what is drawn from. `lost` is the
    share of the dataset's tokens in documents longer than a row, `longest` the longest document.
    """

    name: str
    flag: str
    config: Source.Config
    weight: float
    documents: int
    tokens: int
    lengths: np.ndarray
    lost: float
    longest: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Survey:
    """Spans of rows `edges [N + 1]`; of each, `tokens [N, S]` by number of source and `rows [N, names]` that hold it.

    `looked` rows were looked at; for the others that is reckoned.
    """

    edges: np.ndarray
    tokens: np.ndarray
    rows: np.ndarray
    looked: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Described:
    """A run's plan: `values` are JSON, `mixtures` the sources of each mixture that the run reaches."""

    values: dict[str, Any]
    mixtures: list[list[Measured]]
    survey: Survey
    plan: Plan
    config: PackedRows.Config


def describe(config: PackedRows.Config, rows: PackedRows, steps: int) -> Described:
    """Describes the plan of a run; it is made if it was not."""
    plan, batch = rows.plan, config.batch_rows
    starts = [0, *(change.step for change in config.changes if change.step < steps)]
    mixtures = _measured(config, rows, len(starts))
    names = list(dict.fromkeys(plan.sources))
    survey = _surveyed(plan, names)
    context, held = len(plan) * plan.row_length, plan.summary()
    tokens = sum(used["tokens"] for used in held["sources"].values())
    values = {
        "steps": steps,
        "batch_rows": batch,
        "rows": len(plan),
        "row_length": plan.row_length,
        "context": context,
        "tokens": tokens,
        "documents": int(plan.row_offset[-1]),
        "fill": held["fill"],
        "padding": context - tokens,
        "padding_share": 1 - held["fill"],
        "looked_at_rows": survey.looked,
        "sources": {},
        "mixtures": [],
    }
    ends = [*starts[1:], steps]
    for i, name in enumerate(names):
        mine = {at: m for at, mixture in enumerate(mixtures) for m in mixture if m.name == name}
        weight = sum(m.weight * (ends[at] - starts[at]) for at, m in mine.items()) / steps
        first, used = next(iter(mine.values())), held["sources"][name]
        values["sources"][name] = {
            "weight": weight,
            "share": used["tokens"] / max(1, tokens),
            "tokens": used["tokens"],
            "documents": used["documents"],
            "epochs": used["documents"] / first.documents,
            "mean_length": used["tokens"] / max(1, used["documents"]),
            "rows": min(len(plan), round(float(survey.rows[:, i].sum()))),
            "documents_a_batch": used["documents"] / steps,
            "epoch": {"documents": first.documents, "tokens": first.tokens},
            "held_out": held["held_out"].get(name, 0),
            "rejected": held["rejected"].get(name, {}),
            "ends_at_step": _end(plan, survey, name, batch, [*mine.values()][-1], used["documents"]),
        }
    values["mixtures"] = _by_mixture(mixtures, survey, starts, ends, batch * plan.row_length)
    return Described(values=values, mixtures=mixtures, survey=survey, plan=plan, config=config)


def _measured(config: PackedRows.Config, rows: PackedRows, count: int) -> list[list[Measured]]:
    found = []
    for number, mixture in enumerate(rows.mixtures()[:count]):
        total = sum(source.config.weight for source in mixture)
        before = f"data.changes.{number - 1}." if number else "data."
        found.append(
            [
                _source(source, f"{before}sources.{i}", source.config.weight / total, config.row_length)
                for i, source in enumerate(mixture)
            ]
        )
    return found


def _source(source: Source, flag: str, weight: float, row_length: int) -> Measured:
    full = source.lengths.full
    some = np.unique(np.linspace(0, len(full) - 1, min(len(full), SAMPLE)).astype(np.int64))
    drawn = some[source.select(some)]
    long = full > row_length
    return Measured(
        name=source.name,
        flag=flag,
        config=source.config,
        weight=weight,
        documents=source.documents,
        tokens=source.tokens,
        lengths=np.sort(full[drawn]),
        lost=float(full[long].sum(dtype=np.int64) / max(1, full.sum(dtype=np.int64))),
        longest=int(full.max(initial=0)),
    )


def _surveyed(plan: Plan, names: list[str]) -> Survey:
    numbers, spans = len(plan.sources), min(SPANS, len(plan))
    name_of = np.array([names.index(name) for name in plan.sources])
    edges = np.linspace(0, len(plan), spans + 1).astype(np.int64)
    tokens, rows = np.zeros((spans, numbers)), np.zeros((spans, len(names)))
    most, looked = max(1, LOOK // spans), 0
    for at, (low, high) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
        offset = np.asarray(plan.row_offset[low : high + 1])
        count = max(1, int(np.searchsorted(offset, offset[0] + most, "right")) - 1)
        part = slice(int(offset[0]), int(offset[count]))
        source, length = np.asarray(plan.draws.source[part]), np.asarray(plan.draws.length[part])
        row = np.repeat(np.arange(count), np.diff(offset[: count + 1]))
        holds = np.unique(row * len(names) + name_of[source]) % len(names)
        scale = (high - low) / count
        tokens[at] = scale * np.bincount(source, length, numbers)
        rows[at] = scale * np.bincount(holds, minlength=len(names))
        looked += count
    return Survey(edges=edges, tokens=tokens, rows=rows, looked=looked)


def _by_mixture(
    mixtures: list[list[Measured]], survey: Survey, starts: list[int], ends: list[int], context: int
) -> list[dict[str, Any]]:
    """What each mixture gave, and the fill of its steps, each of `context` tokens.

    A document of the one before may still come after a change.
    """
    found, number = [], 0
    so_far = np.concatenate(([0.0], np.cumsum(survey.tokens.sum(axis=1))))
    at = np.interp(np.array([*starts, ends[-1]]) / ends[-1] * survey.edges[-1], survey.edges, so_far)
    for mixture, start, end, in_rows in zip(mixtures, starts, ends, np.diff(at).tolist(), strict=True):
        tokens = survey.tokens[:, number : number + len(mixture)].sum(axis=0)
        shares = tokens / max(1.0, tokens.sum())
        sources = {m.name: {"weight": m.weight, "share": float(s)} for m, s in zip(mixture, shares, strict=True)}
        fill = in_rows / ((end - start) * context)
        found.append({"from_step": start, "to_step": end, "tokens": round(float(tokens.sum())), "fill": fill})
        found[-1]["sources"] = sources
        number += len(mixture)
    return found


def _end(plan: Plan, survey: Survey, name: str, batch: int, last: Measured, documents: int) -> int | None:
    """The step of a source's last document where `max_epochs` ended it before the run."""
    if last.config.max_epochs is None or documents < last.config.max_epochs * last.documents:
        return None
    numbers = [i for i, each in enumerate(plan.sources) if each == name]
    span = int(np.flatnonzero(survey.tokens[:, numbers].sum(axis=1))[-1])
    low, high = survey.edges[span : span + 2].tolist()
    offset = np.asarray(plan.row_offset[low : high + 1])
    source = np.asarray(plan.draws.source[int(offset[0]) : int(offset[-1])])
    place = int(np.flatnonzero(np.isin(source, numbers))[-1])
    return (low + int(np.searchsorted(offset - offset[0], place, "right")) - 1) // batch
