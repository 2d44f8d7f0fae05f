"""The plan of a run as a page: warnings, tables, packed rows as bars, tokens by source over the steps."""

import base64
from typing import Any

import numpy as np

from mmgpt.data.figures import rows_png, tokens_png
from mmgpt.data.pages import page
from mmgpt.data.plan_values import Described

ROWS = 28
"""Rows that are drawn: evenly over the run."""


def plan_html(told: Described, warned: list[str], title: str) -> str:
    """The page; it loads nothing."""
    values = told.values
    return page(
        "plan.html.jinja",
        title=title,
        values=values,
        sources=values["sources"],
        mixtures=_by_name(values),
        warnings=warned,
        rows=_inline(rows_picture(told)),
        tokens=_inline(_tokens_picture(told)),
    )


def rows_picture(told: Described) -> bytes:
    """Some rows of the plan as a PNG."""
    plan = told.plan
    chosen = np.unique(np.linspace(0, len(plan) - 1, min(ROWS, len(plan))).astype(int)).tolist()
    rows = {}
    for row in chosen:
        draws = plan.row(row)
        rows[row] = [(plan.sources[s], n) for s, n in zip(draws.source.tolist(), draws.length.tolist(), strict=True)]
    return rows_png(rows, plan.row_length, list(told.values["sources"]))


def _tokens_picture(told: Described) -> bytes:
    survey, names = told.survey, told.plan.sources
    tokens = {
        name: np.concatenate(([0.0], np.cumsum(survey.tokens[:, [i for i, n in enumerate(names) if n == name]].sum(1))))
        for name in told.values["sources"]
    }
    changes = [mixture["from_step"] for mixture in told.values["mixtures"][1:]]
    return tokens_png(survey.edges / told.config.batch_rows, tokens, changes)


def _inline(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _by_name(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The mixtures with a cell for every source of the run, None where a mixture has it not."""
    return [
        mixture | {"sources": [mixture["sources"].get(n) for n in values["sources"]]} for mixture in values["mixtures"]
    ]
