"""A plan as a page: memory over the step, where the time goes, a turn of each loop, communication, warnings."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from mmgpt.core.svg import COLOURS, svg
from mmgpt.data.pages import page
from mmgpt.plan.memory import KINDS, Memory
from mmgpt.plan.report import Plan
from mmgpt.plan.schedule import WAITING, Phase, Piece, Told, Turn, Work, by_source

COLUMNS = 300
"""Instructions that the picture of memory draws: of each span of them the one where most is in use."""
TURNS = 4
"""Loops whose turns are drawn, those first that take longest."""
PHASES = (*get_args(Phase), "")
WORK: dict[str, str] = dict(
    zip(get_args(Work), (COLOURS[0], COLOURS[4], COLOURS[3], "#93a1ad", "#c9b458", "#6b7f99", "#d64545"), strict=True)
)
"""Colours of what the TensorCores do."""
PHASE_COLOURS: dict[str, str] = dict(
    zip(get_args(Phase), ("#7fb2e5", "#e5a86a", "#6fbf93", "#c79ac0", "#b0b0b0"), strict=True)
)
CARRIED = {
    "all-gather": COLOURS[2],
    "reduce-scatter": COLOURS[1],
    "all-reduce": COLOURS[3],
    "collective-permute": COLOURS[6],
}
"""Colours of transfers; others have one."""
OTHERS = "#9a8c4a"
ROWS = {"cores": "TensorCores", "phase": "phase", "links": "links", "network": "network", "host": "host"}
"""Rows of a turn's picture, from the top; a channel without transfers is left out."""
MEMORY: dict[str, str] = dict(
    zip(KINDS, ("#3b6fb6", "#7fa3d1", "#b3c7e2", "#8d99a6", "#e5843a", "#2fa36b", "#8a76e8", "#c9b458"), strict=True)
)


def plan_html(made: Plan, name: str) -> str:
    """The page of a plan of what is called `name`; it loads nothing."""
    numbers, told, memory = made.numbers(), made.told, made.compiled.memory
    return page(
        "plan.html.jinja",
        folder=Path(__file__).parent,
        title=f"{name} on {made.topology}",
        numbers=numbers,
        mesh={axis: size for axis, size in made.compiled.mesh.shape.items() if size > 1},
        chips=made.devices // made.chip.whole,
        limit=made.chip.memory,
        attention=made.attention,
        memory_svg=Markup(memory_svg(memory)),
        kinds=_shares(memory.at_peak(), MEMORY | {"between buffers": "#d9dcdf"}),
        largest=memory.largest[:12],
        time_svg=Markup(time_svg(told)),
        what=_shares(told.by_what, WORK),
        turns=[
            {
                "phases": _phases(turn),
                "times": turn.times,
                "seconds": turn.seconds,
                "share": turn.seconds * turn.times / told.seconds,
                "svg": Markup(turn_svg(turn, f"turn{i}")),
            }
            for i, turn in enumerate(longest(told))
        ],
        communication=[
            {"what": key, "runs": runs, "bytes": size, "waited": waited}
            for key, (runs, size, waited) in sorted(by_source(told).items(), key=lambda item: -item[1][1])
        ],
        json=json.dumps(numbers, indent=2),
    )


def _shares(parts: Mapping[str, float], colours: Mapping[str, str]) -> list[dict[str, Any]]:
    """Parts of a whole with their colours, largest first."""
    whole = sum(parts.values()) or 1.0
    ordered = sorted(parts.items(), key=lambda item: -item[1])
    return [
        {"name": name, "value": value, "share": value / whole, "colour": colours[name]}
        for name, value in ordered
        if value
    ]


# --- memory


def memory_svg(memory: Memory) -> str:
    """Memory over the instructions of a step, by kind: what lies there throughout beneath what comes and goes."""
    lines = {**{k: v for k in KINDS if (v := memory.held.get(k))}, **{k: v for k, v in memory.over.items() if v.any()}}
    alive = np.sum(list(memory.over.values()), axis=0)
    chosen = np.array([int(part[np.argmax(alive[part])]) for part in _parts(len(alive))])
    at = chosen / max(1, len(alive) - 1) * 100
    stacked = [np.broadcast_to(line, len(alive))[chosen] / 1e9 for line in lines.values()]
    peak, limit, needed = int(np.argmax(alive)), memory.limit / 1e9, memory.total / 1e9

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.stackplot(at, stacked, colors=[MEMORY[kind] for kind in lines], linewidth=0, step="mid")
        place, top = peak / max(1, len(alive) - 1) * 100, (sum(memory.held.values()) + alive[peak]) / 1e9
        axes.plot([place], [top], "v", color=WORK[WAITING], markersize=7, clip_on=False, zorder=5)
        side = "left" if place < 50 else "right"
        above = {"textcoords": "offset points", "fontsize": 9}
        axes.annotate(f" peak: {top:.3g} GB ", (place, top), (0, 7), ha=side, **above)
        axes.axhline(needed, linewidth=1, linestyle=":", color=MEMORY["average"])
        axes.annotate(f"laid out: {needed:.3g} GB, with gaps between buffers", (0.5, needed), (0, 3), **above)
        if limit < 3 * needed:
            axes.axhline(limit, color=WORK[WAITING], linewidth=1.3, linestyle="--")
            axes.annotate(f"a chip has {limit:.3g} GB", (99.5, limit), (0, 3), ha="right", **above)
        else:
            axes.annotate(f"a chip has {limit:.3g} GB, far above", (99.5, 1.12 * needed), (0, -10), ha="right", **above)
        axes.set(xlim=(0, 100), ylim=(0, (max(limit, needed) if limit < 3 * needed else needed) * 1.12))
        axes.set_xlabel("instructions of the step in their order, %")
        axes.set_ylabel("GB")
        _plain(axes)
        _legend(figure, [(kind, MEMORY[kind]) for kind in lines])

    return svg(draw, 11.0, 4.6, "memory")


def _parts(count: int) -> list[np.ndarray]:
    return [part for part in np.array_split(np.arange(count), COLUMNS) if len(part)]


# --- time


def time_svg(told: Told) -> str:
    """Seconds by phase, each bar by what is done."""
    phases = [phase for phase in PHASES if any(p == phase and seconds for (p, _), seconds in told.by_part.items())]
    unit, scale = ("ms", 1e3) if told.seconds < 10 else ("s", 1.0)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for row, phase in enumerate(phases):
            left = 0.0
            for what, colour in WORK.items():
                width = told.by_part.get((phase, what), 0.0) * scale
                axes.barh(row, width, 0.7, left, color=colour)
                left += width
            share = left / scale / told.seconds
            said = f"{left:,.3g} {unit}, {share:.1%}"
            axes.annotate(said, (left, row), (5, 0), textcoords="offset points", va="center", fontsize=9)
        axes.set_yticks(range(len(phases)), [phase or "waiting" for phase in phases])
        axes.invert_yaxis()
        axes.margins(x=0.16)
        axes.set_xlim(left=0)
        axes.set_xlabel(f"{unit} of a step")
        _plain(axes)
        used = {what for (_, what), seconds in told.by_part.items() if seconds}
        _legend(figure, [(what, colour) for what, colour in WORK.items() if what in used])

    return svg(draw, 11.0, 0.75 + 0.42 * len(phases), "time")


def longest(told: Told) -> list[Turn]:
    """The loops that take three hundredths of the step or more, longest first."""
    found = sorted(told.turns.values(), key=lambda turn: -turn.seconds * turn.times)
    return [turn for turn in found[:TURNS] if turn.seconds * turn.times >= 0.03 * told.seconds]


def _phases(turn: Turn) -> str:
    """The phases of a turn's work, longest first; a loop around another has that one's."""
    seconds: dict[str, float] = {}
    for piece in turn.pieces:
        seconds[piece.phase] = seconds.get(piece.phase, 0.0) + piece.seconds * (piece.row == "cores")
    named = [p for p in sorted(seconds, key=lambda p: -seconds[p]) if p and seconds[p] > 0.02 * turn.seconds]
    return " and ".join(named) or "a loop of loops"


def turn_svg(turn: Turn, name: str) -> str:
    """A turn of a loop as a time line: what the TensorCores do, and beneath it what the channels carry."""
    scale = 1e6 if turn.seconds < 1e-3 else 1e3
    by_row: dict[str, list[tuple[str, float, float]]] = {row: [] for row in ROWS}
    for piece in turn.pieces:
        by_row[piece.row] += [(piece.what, *span) for span in _wrapped(piece, turn.seconds)]
        if piece.row == "cores" and piece.phase:
            by_row["phase"].append((piece.phase, piece.begin, piece.seconds))
    rows = [row for row in ROWS if any(seconds > 0 for _, _, seconds in by_row[row])]
    colours = WORK | PHASE_COLOURS | CARRIED

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for place, row in enumerate(rows):
            height = 0.3 if row == "phase" else 0.8
            for what, begin, seconds in _joined(by_row[row], turn.seconds / 2000):
                bar = (begin * scale, seconds * scale)
                axes.broken_barh([bar], (place - height / 2, height), facecolors=colours.get(what, OTHERS), linewidth=0)
        axes.set_yticks(range(len(rows)), [ROWS[row] for row in rows])
        axes.set(xlim=(0, turn.seconds * scale), ylim=(len(rows) - 0.4, -0.6))
        axes.set_xlabel("ms" if scale == 1e3 else "µs")
        _plain(axes)
        used = list(dict.fromkeys(what for row in rows for what, _, seconds in by_row[row] if seconds > 0))
        ordered = [what for what in colours if what in used] + [what for what in used if what not in colours]
        _legend(figure, [(what, colours.get(what, OTHERS)) for what in ordered])

    return svg(draw, 11.0, 1.3 + 0.36 * len(rows), name)


def _wrapped(piece: Piece, whole: float) -> Iterable[tuple[float, float]]:
    """A piece as spans within a turn: what outlasts it goes on at the next turn's beginning."""
    begin, left = piece.begin % whole if whole else 0.0, piece.seconds
    while left > 0:
        span = min(left, whole - begin)
        if span <= 0:
            return
        yield begin, span
        begin, left = 0.0, left - span


def _joined(spans: list[tuple[str, float, float]], gap: float) -> list[tuple[str, float, float]]:
    """Spans in their order, those of one kind with less than `gap` between them as one."""
    found: list[tuple[str, float, float]] = []
    for what, begin, seconds in sorted(spans, key=lambda span: span[1]):
        if seconds <= 0:
            continue
        if found and found[-1][0] == what and begin - (found[-1][1] + found[-1][2]) <= gap:
            end = max(begin + seconds, found[-1][1] + found[-1][2])
            found[-1] = what, found[-1][1], end - found[-1][1]
        else:
            found.append((what, begin, seconds))
    return found


# --- both


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)


def _legend(figure: Figure, entries: list[tuple[str, str]]) -> None:
    handles = [Patch(color=colour, label=name) for name, colour in entries]
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=min(8, len(handles)),
        frameon=False,
        fontsize=9,
        handlelength=1.0,
    )
