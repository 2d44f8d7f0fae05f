"""Charts as inline SVG that fits a light and a dark page: marks in mid tones, text in the page's own colour."""

import io
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.figure import Figure

COLOURS = ("#3b82f6", "#e5843a", "#2fa36b", "#c0569b", "#8a76e8", "#9a8c4a", "#4aa3b5")
_INK = "#123456"
"""Stands for the page's text colour until the SVG is written."""


def svg(draw: Callable[[Figure], None], width: float, height: float, name: str) -> str:
    """The figure that `draw` fills, its size in inches; `name` keeps ids apart on a page."""
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": _INK,
        "axes.edgecolor": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :].replace(_INK, "currentColor")
