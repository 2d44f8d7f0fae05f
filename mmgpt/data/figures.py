"""Pictures of data for pages: lengths of documents, packed rows as bars, tokens by source over a run."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from mmgpt.core.svg import COLOURS, svg

PADDING = "#d9dcdf"
"""Colour of padding, hatched."""
_HATCH = "#aab0b6"
_MORE = ("#6b7f99", "#b8a13a", "#7fb36b", "#a05a4a", "#5e5ea8", "#c88fb0", "#7a7a7a")
_SHARES = 40
"""Spans of a run for which shares are drawn."""
_NUMBER = FuncFormatter(lambda value, _: f"{value:,.0f}" if abs(value) < 1e4 else EngFormatter(sep=" ")(value))


def colour(number: int) -> str:
    """The colour of a source; they come round again after fourteen."""
    palette = COLOURS + _MORE
    return palette[number % len(palette)]


def histogram_svg(found: Mapping[str, Any], name: str) -> str:
    """Documents by length beside what they add up to, of `statistics`; "" where there is no length."""
    bars, unit = found["histogram"], found["length_unit"]
    if not sum(bars["lengths"]):
        return ""

    def draw(figure: Figure) -> None:
        panels = {"documents": bars["documents"], f"{unit} in them": bars["lengths"]}
        for place, (title, counts) in enumerate(panels.items(), 1):
            axes = figure.add_subplot(1, 2, place)
            _bars(axes, bars["edges"], counts, COLOURS[place - 1])
            axes.set_title(f"{title} by length", fontsize=10)
            axes.set_xlabel(f"{unit} of a document")

    return svg(draw, 9.0, 2.5, name)


def _bars(axes: Axes, edges: list[int], counts: list[int], paint: str) -> None:
    """Bars of one width: edges that double are as far apart as edges by equal steps."""
    at = np.arange(len(counts))
    axes.bar(at + 0.5, counts, 0.92, color=paint)
    every = max(1, -(-len(edges) // 9))
    axes.set_xticks(
        np.arange(len(edges))[::every],
        [f"{edge:,}" if edge < 1e6 else _NUMBER(edge) for edge in edges[::every]],
        fontsize=8,
    )
    axes.yaxis.set_major_formatter(_NUMBER)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def by_kind_svg(sources: Mapping[str, Mapping[str, int]], unit: str, name: str) -> str:
    """A bar for each source, in parts by kind of segment; "" where there is no length."""
    kinds = list(dict.fromkeys(kind for parts in sources.values() for kind in parts))
    if not kinds:
        return ""
    names = list(sources)[::-1]

    def draw(figure: Figure) -> None:
        axes, left = figure.add_subplot(), np.zeros(len(names))
        for i, kind in enumerate(kinds):
            width = np.array([sources[source].get(kind, 0) for source in names], float)
            axes.barh(names, width, 0.7, left=left, color=colour(i), label=kind)
            left += width
        axes.xaxis.set_major_formatter(_NUMBER)
        axes.set_xlabel(unit)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))

    return svg(draw, 9.0, 0.9 + 0.28 * len(names), name)


# --- plans


def rows_png(rows: Mapping[int, Sequence[tuple[str, int]]], row_length: int, sources: Sequence[str]) -> bytes:
    """Packed rows as bars: row number -> (source, tokens) of its documents in order. What is left is padding."""
    figure = Figure(figsize=(10.5, 1.3 + 0.24 * len(rows)), layout="constrained", dpi=110)
    axes = figure.add_subplot()
    colours = {source: colour(i) for i, source in enumerate(sources)}
    for at, documents in enumerate(rows.values()):
        ends = np.cumsum([0, *(tokens for _, tokens in documents)])
        axes.barh(
            [at] * len(documents),
            np.diff(ends),
            0.8,
            left=ends[:-1],
            color=[colours[source] for source, _ in documents],
            edgecolor="white",
            linewidth=0.6,
        )
        if ends[-1] < row_length:
            left = float(row_length - ends[-1])
            axes.barh(at, left, 0.8, left=float(ends[-1]), color=PADDING, hatch="////", edgecolor=_HATCH, linewidth=0.0)
    axes.set_yticks(range(len(rows)), [f"{row:,}" for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, row_length)
    axes.set_ylabel("row")
    axes.set_xlabel("token of the row")
    axes.xaxis.set_major_formatter(_NUMBER)
    axes.margins(y=0.01)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    shown = [Patch(color=paint, label=source) for source, paint in colours.items()]
    shown.append(Patch(facecolor=PADDING, hatch="////", edgecolor=_HATCH, linewidth=0.0, label="padding"))
    figure.legend(handles=shown, loc="outside upper left", ncols=8, frameon=False, fontsize=9)
    return _png(figure)


def tokens_png(steps: np.ndarray, tokens: Mapping[str, np.ndarray], changes: Sequence[int]) -> bytes:
    """Tokens by source up to each step, one above the other, and beside them their shares; lines where the mixture
    changes."""
    figure = Figure(figsize=(10.5, 3.2), layout="constrained", dpi=110)
    colours = [colour(i) for i in range(len(tokens))]
    stack = np.stack(list(tokens.values()))
    total, shares = figure.subplots(1, 2)
    total.stackplot(steps, stack, colors=colours, labels=list(tokens), linewidth=0)
    total.set_title("tokens by source so far", fontsize=10)
    total.yaxis.set_major_formatter(EngFormatter(sep=" "))
    coarse = np.unique(np.linspace(0, len(steps) - 1, _SHARES + 1).astype(int))  # few documents a span are noise
    gained = np.diff(stack[:, coarse], axis=1)
    for i, values in enumerate(gained / np.maximum(1, gained.sum(axis=0))):
        shares.stairs(values, steps[coarse], color=colours[i], linewidth=1.4, baseline=None)
    shares.set_title("share of the tokens", fontsize=10)
    shares.set_ylim(bottom=0.0)
    shares.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
    for axes in (total, shares):
        axes.set_xlabel("step")
        axes.set_xlim(float(steps[0]), float(steps[-1]))
        axes.xaxis.set_major_formatter(_NUMBER)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        for step in changes:
            axes.axvline(step, color="#333333", linewidth=1.0, linestyle="--")
    handles, labels = total.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=8, frameon=False, fontsize=9)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()
