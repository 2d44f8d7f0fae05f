"""A picture of an attention plan: the blocks of queries and keys, coloured by class, with the documents along them."""

import io
from pathlib import Path

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from mmgpt.core.log import write_atomic
from mmgpt.kernels.attention import plan

SHADES = {"not visited": "#f1f3f5", "full": "#2b6cb0", "edge": "#e5843a", "mixed": "#9b4d96"}
"""By class, in the order of their numbers."""
BOUNDARY = "#495057"


def classes(made: plan.Plan) -> np.ndarray:
    """The class of each block, `[blocks of queries, blocks of keys]`; EMPTY where the plan visits nothing."""
    i, j, klass = (np.asarray(x) for x in plan.unpacked(made.by_query[: int(made.count_by_query[0])]))
    found = np.zeros((made.start.size // made.blocks.q, made.key_island.size // made.blocks.k), np.int32)
    found[i, j] = klass
    return found


def draw(made: plan.Plan, document: np.ndarray, title: str, path: Path) -> None:
    """Writes the plan of one row `document [T]` as a PNG."""
    write_atomic(path, png(made, document, title))


def png(made: plan.Plan, document: np.ndarray, title: str) -> bytes:
    """The picture: queries downwards, keys to the right, ticks in tokens, thin lines where documents begin."""
    klass = classes(made)
    rows, columns = klass.shape
    figure = Figure(figsize=(8.4, 9.2), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    colours = ListedColormap(list(SHADES.values()))
    extent = (0, columns * made.blocks.k, rows * made.blocks.q, 0)
    axes.imshow(klass, cmap=colours, vmin=-0.5, vmax=3.5, extent=extent, interpolation="nearest")
    if max(rows, columns) <= 40:  # more would be a grey haze
        axes.vlines(np.arange(1, columns) * made.blocks.k, 0, extent[2], color="white", linewidth=0.8)
        axes.hlines(np.arange(1, rows) * made.blocks.q, 0, extent[1], color="white", linewidth=0.8)
    begins = np.flatnonzero(np.diff(document)) + 1
    _boundaries(axes, begins, len(document))
    thousands = _ticks(len(document))
    for side in (axes.set_xticks, axes.set_yticks):
        side(thousands, [f"{t // 1024}k" if t else "0" for t in thousands])
    axes.set_xlabel("keys (tokens)")
    axes.set_ylabel("queries (tokens)")
    axes.spines[:].set_visible(False)
    _legend(figure, klass)
    n = min(rows, columns)
    below, visited = n * (n + 1) // 2, int(np.sum(klass != plan.EMPTY))
    sizes = f"blocks of {made.blocks.q} x {made.blocks.k}, {len(begins) + 1} documents"
    share = f"{visited} of {below} causal blocks visited ({100 * visited / below:.1f} %)"
    axes.set_title(f"{title}: {share}\n{sizes}", fontsize=12, loc="left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _boundaries(axes: Axes, begins: np.ndarray, length: int) -> None:
    """Where documents begin: combs along both axes, and, where they are few, lines down to the diagonal."""
    comb = 0.018 * length
    axes.hlines(begins, -comb, 0, color=BOUNDARY, linewidth=0.8, clip_on=False)
    axes.vlines(begins, -comb, 0, color=BOUNDARY, linewidth=0.8, clip_on=False)
    if len(begins) <= 12:
        axes.hlines(begins, 0, begins, color=BOUNDARY, linewidth=0.5, linestyle=(0, (4, 3)))
        axes.vlines(begins, begins, length, color=BOUNDARY, linewidth=0.5, linestyle=(0, (4, 3)))
    axes.set_xlim(-comb, length)
    axes.set_ylim(length, -comb)


def _ticks(length: int) -> list[int]:
    step = max(1024, 1 << (length // 8).bit_length() - 1 if length >= 8 else 1)
    return list(range(0, length + 1, step))


def _legend(figure: Figure, klass: np.ndarray) -> None:
    counts = np.bincount(klass.reshape(-1), minlength=len(SHADES))
    marks = [
        Patch(facecolor=colour, edgecolor="#ced4da", label=f"{name} {count}")
        for (name, colour), count in zip(SHADES.items(), counts, strict=True)
        if count or name == "not visited"
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), frameon=False, fontsize=11)


def picture_of(document: np.ndarray, blocks: plan.Blocks, title: str, path: Path) -> None:
    """Plans a packed row and draws its plan."""
    from mmgpt.plan.attention import planned

    draw(jax.device_get(planned(document, blocks)), document, title, path)
