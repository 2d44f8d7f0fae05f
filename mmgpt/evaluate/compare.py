"""Two or more runs side by side: where their configs differ, their curves on one chart, their scores in one table."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mmgpt.core import config
from mmgpt.evaluate.charts import Line, lines_svg
from mmgpt.evaluate.report import ReportError, RunFolder, metric_line, open_folder


def open_runs(paths: Sequence[Path]) -> list[RunFolder]:
    """The runs under names that tell them apart; ReportError where there are fewer than two, or one twice."""
    if len(paths) < 2 or len({path.resolve() for path in paths}) < len(paths):
        raise ReportError(f"a comparison needs two or more run folders, each once; found {', '.join(map(str, paths))}.")
    return [open_folder(path) for path in paths]


def labels(runs: Sequence[RunFolder]) -> list[str]:
    """A short name for each run: the parts of its path in which it differs from the others."""
    parts = [run.path.resolve().parts for run in runs]
    common = 0
    while len({p[common] for p in parts if len(p) > common}) == 1 and all(len(p) > common + 1 for p in parts):
        common += 1
    return ["/".join(p[common:]) for p in parts]


def config_rows(runs: Sequence[RunFolder]) -> dict[str, list[Any]]:
    """Settings in which the runs differ: dotted key -> the value in each run, None where a run has no such key."""
    leaves = [config.leaves(run.run) for run in runs]
    keys = dict.fromkeys(key for found in leaves for key in found)
    rows = {key: [found.get(key) for found in leaves] for key in keys}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def curves(runs: Sequence[RunFolder], keys: Sequence[str] = ()) -> Markup:
    """One chart per figure with a line per run, over steps; by default the training loss and every held-out loss.

    A key is a name in metrics.jsonl's training lines ("loss/image") or, with "held_out:" before it, held-out lines.
    """
    chosen = list(keys) or ["loss", *(f"held_out:{key}" for key in _held_out_losses(runs))]
    panels: dict[str, dict[str, Line]] = {}
    for key in chosen:
        kind, _, name = key.rpartition(":")
        lines = {
            label: metric_line(run.of(kind or "train"), name) for label, run in zip(labels(runs), runs, strict=True)
        }
        panels[key.replace("held_out:", "held-out ")] = {label: line for label, line in lines.items() if line[0]}
    return Markup(lines_svg({title: lines for title, lines in panels.items() if lines}, "step", "compare"))


def _held_out_losses(runs: Sequence[RunFolder]) -> list[str]:
    """Held-out losses by modality of the first source that all runs have."""
    found = [{key for line in run.of("held_out") for key in line if "/loss/" in key} for run in runs]
    shared = sorted(set.intersection(*found))
    return [key for key in shared if key.partition("/")[0] == shared[0].partition("/")[0]]


def score_rows(runs: Sequence[RunFolder]) -> dict[str, list[float | None]]:
    """`task metric` -> the figure of each run's `eval/TASK/records.json`, None where a run has not that task."""
    scores = [_scores(run.path) for run in runs]
    keys = dict.fromkeys(key for found in scores for key in found)
    return {key: [found.get(key) for found in scores] for key in keys}


def _scores(run: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    for path in sorted((run / "eval").glob("*/records.json")):
        try:
            task = json.loads(path.read_text())
            found |= {f"{task['name']} {metric}": task["scores"][metric] for metric in task["metrics"]}
        except (ValueError, KeyError, TypeError) as e:
            raise ReportError(f"{path}: cannot be read ({type(e).__name__}: {e}). Run `mmgpt eval` again.") from e
    return found
