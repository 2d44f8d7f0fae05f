"""Charts of lines as inline SVG, in panels side by side."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmgpt.core.svg import COLOURS, svg

Line = tuple[Sequence[float], Sequence[float]]
"""x and y of a line."""


def lines_svg(panels: Mapping[str, Mapping[str, Line]], x_label: str, name: str) -> str:
    """Panels side by side with one chart of lines each, their titles and legends; `name` keeps ids apart on a page.

    A line has one colour in all panels.
    """
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    colours = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}

    def draw(figure: Figure) -> None:
        for place, (title, lines) in enumerate(panels.items(), 1):
            _panel(figure.add_subplot(1, len(panels), place), title, lines, colours, x_label)

    return svg(draw, max(4.2, 3.6 * len(panels)), 2.8, name)


def _panel(axes: Axes, title: str, lines: Mapping[str, Line], colours: Mapping[str, str], x_label: str) -> None:
    axes.set_title(title, fontsize=10)
    for label, (x, y) in lines.items():
        marker = "o" if len(x) < 12 else None
        axes.plot(x, y, color=colours[label], label=label, linewidth=1.6, marker=marker, markersize=3)
    axes.set_xlabel(x_label)
    axes.set_ylim(bottom=0.0)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if lines:
        axes.legend(frameon=False, fontsize=8)
