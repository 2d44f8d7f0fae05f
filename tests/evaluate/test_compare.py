"""Two runs side by side: differing settings, shared curves, scores of both."""

import json
import shutil
from pathlib import Path

import pytest

from mmgpt.core.errors import UserError
from mmgpt.evaluate.compare import config_rows, curves, labels, open_runs, score_rows


@pytest.fixture
def pair(model_run: Path, tmp_path: Path) -> list[Path]:
    """Two copies of a run; the second learned at another rate, and one task was scored there alone."""
    paths = [tmp_path / name / "model" for name in ("first", "second")]
    for path in paths:
        path.mkdir(parents=True)
        for name in ("config.json", "metrics.jsonl"):
            shutil.copy(model_run / name, path / name)
    body = json.loads((paths[1] / "config.json").read_text())
    body["optimizer"]["learning_rate"] = 0.125
    (paths[1] / "config.json").write_text(json.dumps(body))
    for path, shares in zip(paths, ({"right": 0.5}, {"right": 0.75, "placed": 1.0}), strict=True):
        for task in ("draw", "label")[: len(shares)]:
            (path / "eval" / task).mkdir(parents=True)
            words = {"name": task, "metrics": {"right": "all right"}, "scores": {"right": shares["right"]}}
            (path / "eval" / task / "records.json").write_text(json.dumps(words))
    return paths


def test_shows_only_settings_that_differ(pair: list[Path]):
    rows = config_rows(open_runs(pair))
    assert list(rows) == ["optimizer.learning_rate"]
    assert rows["optimizer.learning_rate"][1] == 0.125 != rows["optimizer.learning_rate"][0]


def test_names_and_scores(pair: list[Path]):
    runs = open_runs(pair)
    assert labels(runs) == ["first/model", "second/model"]
    assert score_rows(runs) == {"draw right": [0.5, 0.75], "label right": [None, 0.75]}


def test_curves_hold_a_line_for_each_run(pair: list[Path]):
    svg = str(curves(open_runs(pair)))
    assert svg.startswith("<svg") and svg.count("first/model") == svg.count("second/model") > 0
    assert "held-out left/loss/image" in svg and "held-out right" not in svg
    assert "loss/image" in str(curves(open_runs(pair), ["loss/image"]))


def test_one_run_is_no_comparison(pair: list[Path]):
    with pytest.raises(UserError, match="two or more"):
        open_runs([pair[0], pair[0]])


def test_damaged_records_are_named(pair: list[Path]):
    (pair[0] / "eval" / "draw" / "records.json").write_text("{")
    with pytest.raises(UserError, match=r"draw/records\.json.*mmgpt eval"):
        score_rows(open_runs(pair))
