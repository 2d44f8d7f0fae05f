"""`mmgpt report`: one self-contained page of what the runs of a folder learned, and their figures in `scores.json`."""

import base64
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import jax
import jinja2
import numpy as np
import tyro
from markupsafe import Markup

from mmgpt.core import config
from mmgpt.core.errors import UserError
from mmgpt.core.log import console, read_metrics, write_atomic, write_json
from mmgpt.core.stream import MODALITIES
from mmgpt.data.media import encode_gif, encode_png, resize
from mmgpt.evaluate.charts import lines_svg
from mmgpt.evaluate.records import Record, Records, load_records
from mmgpt.generate.model import Part
from mmgpt.train.run import Run, build

FPS = 3.0
GIF_SCALE = 2
"""Clips are enlarged, since a GIF at its own size is too small for the eye."""


class ReportError(UserError, ValueError):
    """A folder that holds nothing to report."""


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A run of the folder: its config, its metrics lines and its folder."""

    name: str
    path: Path
    run: Run
    metrics: list[dict[str, Any]]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.metrics if line["kind"] == kind]


def report(folder: tyro.conf.Positional[Path], examples: int = 12) -> None:
    """Writes FOLDER/report.html and adds training, times and memory to FOLDER/scores.json.

    Args:
        folder: a recipe's folder, which holds run folders; or one run folder.
        examples: prompts shown for each task: the first ones, good or bad.
    """
    runs = [open_folder(path) for path in _run_folders(folder)]
    tasks = [load_records(path.parent, examples) for run in runs for path in _records_of(run.path)]
    times = _json(folder / "times.json")
    scores = _json(folder / "scores.json") | {t.name: t.scores for t in tasks}
    scores |= {"training": {run.name: training(run) for run in runs}}
    if times:
        total = round(sum(t["seconds"] for t in times.values()), 1)
        scores |= {"times": times, "total_seconds": total, "peak_gib": max(t["peak_gib"] for t in times.values())}
    write_json(folder / "scores.json", scores)
    write_atomic(folder / "report.html", _page(folder, runs, tasks, scores, times))
    console.print(f"wrote {folder / 'report.html'} and {folder / 'scores.json'}")


def _run_folders(folder: Path) -> list[Path]:
    candidates = [folder, *sorted(path for path in folder.glob("*") if path.is_dir())]
    found = [path for path in candidates if (path / "config.json").is_file() and (path / "metrics.jsonl").is_file()]
    if not found:
        raise ReportError(f"{folder}: neither a run folder nor a folder of runs: no config.json with metrics.jsonl.")
    return sorted(found, key=lambda path: not (path / "eval").is_dir())  # what has scores comes first


def open_folder(path: Path) -> RunFolder:
    """A run folder's config and metrics; ConfigError or ReportError where it is none."""
    run = config.load(path / "config.json")
    if not isinstance(run, Run):
        raise ReportError(f"{path}/config.json is not the config of a training run.")
    try:
        metrics = read_metrics(path / "metrics.jsonl")
    except ValueError as e:
        raise ReportError(str(e)) from e
    return RunFolder(path.resolve().name, path, run, metrics)


def _records_of(run: Path) -> list[Path]:
    """Tasks in the order in which they were evaluated."""
    return sorted((run / "eval").glob("*/records.json"), key=lambda path: path.stat().st_mtime_ns)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as e:
        raise ReportError(f"{path}: not JSON ({e}). Delete it; `mmgpt eval --json` writes it again.") from e
    return value if isinstance(value, dict) else {}


def training(run: RunFolder) -> dict[str, Any]:
    """Figures of a training run: steps, seconds in steps, final loss, share of a plain matmul, parameters."""
    lines = run.of("train")
    last = lines[-1] if lines else {"step": 0, "loss": None}
    figures: dict[str, Any] = {"steps": last["step"], "final_loss": last["loss"]}
    before, seconds = 0, sum(line.get("compile_seconds", 0.0) for line in run.of("start"))
    for line in lines:
        seconds += (line["step"] - before) * line.get("step_seconds", 0.0)
        before = line["step"]
    figures["seconds"] = round(seconds, 1)
    for name in ("matmul_share", "flops_per_second", "step_seconds"):
        values = [line[name] for line in lines if name in line]
        if values:
            figures[name] = round(statistics.median(values), 4)
    try:
        built = build(run.run)
        with jax.set_mesh(built.mesh):
            figures["parameters"] = built.structure.parameters()
    except UserError:
        figures["parameters"] = None  # its tokenizers are gone; all else is here
    return figures


def _page(
    folder: Path, runs: list[RunFolder], tasks: list[Records], scores: dict[str, Any], times: dict[str, Any]
) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"percent": _percent, "duration": _duration, "figure": _figure}
    return environment.get_template("report.html.jinja").render(
        title=folder.resolve().name,
        tasks=[{"words": task, "cards": [_card(r) for r in task.records], "kinds": _kinds(task)} for task in tasks],
        runs=[_run_view(run, scores["training"][run.name]) for run in runs],
        times=[{"command": command, **values} for command, values in times.items()],
        total=scores.get("total_seconds"),
        peak=scores.get("peak_gib"),
    )


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %" if share < 1 else "100 %"


def _figure(task: Records, metric: str, value: float) -> str:
    return task.shown(metric, value) if task.is_number(metric) else _percent(value)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _kinds(task: Records) -> list[tuple[str, float]]:
    prefix = f"{task.figure}/"
    return [(name.removeprefix(prefix), value) for name, value in task.scores.items() if name.startswith(prefix)]


def _card(record: Record) -> dict[str, Any]:
    """A record as cells in reading order: texts with the medium after them; last texts stand below the last medium."""
    prompt = record.prompt
    if record.made and record.made[0].given:
        prompt = prompt[:-1]  # the clip made holds the given frames too
    parts = [_part(part, made=False) for part in prompt] + [_part(part, made=True) for part in record.made]
    cells: list[list[dict[str, Any]]] = [[]]
    for part in parts:
        cells[-1].append(part)
        if not part["text"]:
            cells.append([])
    last = cells.pop()
    if cells:
        cells[-1] += last
    else:
        cells = [last]
    told = bool(record.made) and all(part.frames is None for part in record.made)
    return {"record": record, "cells": cells, "show_truth": told or not record.right, "empty": not record.made}


def _part(part: Part, *, made: bool) -> dict[str, Any]:
    if part.frames is None:
        return {"text": part.text or " ", "made": made}
    if not part.clip:
        return {"text": "", "made": made, "frames": [{"src": _png(part.frames[0]), "made": made}], "gif": ""}
    frames = [{"src": _png(frame), "made": made and i >= part.given} for i, frame in enumerate(part.frames)]
    return {"text": "", "made": made, "frames": frames, "gif": _gif(part.frames)}


def _png(picture: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(encode_png(picture)).decode()


def _gif(frames: np.ndarray) -> str:
    height, width = GIF_SCALE * frames.shape[1], GIF_SCALE * frames.shape[2]
    large = np.stack([resize(frame, height, width) for frame in frames])
    return "data:image/gif;base64," + base64.b64encode(encode_gif(large, FPS)).decode()


def _run_view(run: RunFolder, figures: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": run.name,
        "figures": figures,
        "chart": chart(run),
        "held_out": _held_out(run),
        "samples": _samples(run.path),
    }


def chart(run: RunFolder) -> Markup:
    """Training loss by modality and held-out loss by modality and source; the plain loss where there are none."""
    lines, held_out = run.of("train"), run.of("held_out")
    modalities = [name for name in MODALITIES if any(f"loss/{name}" in line for line in lines)]
    names = {name: f"loss/{name}" for name in modalities} or {"loss": "loss"}
    panels = {"training loss": {label: metric_line(lines, key) for label, key in names.items()}}
    for name in modalities:
        keys = sorted({key for line in held_out for key in line if key.endswith(f"/loss/{name}")})
        panels[f"held-out {name}"] = {key.partition("/")[0]: metric_line(held_out, key) for key in keys}
    return Markup(lines_svg({title: curves for title, curves in panels.items() if curves}, "step", run.name))


def _held_out(run: RunFolder) -> list[tuple[str, float]]:
    """The last held-out figures of a run whose losses have no modality."""
    lines = run.of("held_out")
    if not lines or any("loss/" in key for key in lines[-1]):
        return []
    return [(key.replace("/", " ", 1), value) for key, value in lines[-1].items() if "/" in key]


def metric_line(lines: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """A curve; a modality that a batch did not hold is written as exactly 0 and left out."""
    kept = [line for line in lines if key in line and line[key] != 0.0]
    return [line["step"] for line in kept], [line[key] for line in kept]


def _samples(path: Path, most: int = 6) -> list[dict[str, str]]:
    """Pictures that the run drew while it was trained, evenly over its steps, with their step and texts."""
    pictures = sorted((path / "samples").glob("*.png"))
    chosen = sorted({round(i) for i in np.linspace(0, len(pictures) - 1, min(most, len(pictures)))}) if pictures else []
    views = []
    for picture in (pictures[i] for i in chosen):
        step, _, name = picture.stem.partition("-")
        text = picture.with_suffix(".txt")
        source = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
        told = text.read_text() if text.is_file() else ""
        views.append({"name": name, "step": step.lstrip("0") or "0", "src": source, "text": told})
    return views
