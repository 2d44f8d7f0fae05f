"""The bench of checkpoints saves and loads what it says, and refuses what makes no bench."""

import json
from pathlib import Path

import pytest

from mmgpt import cli
from mmgpt.core.config import ConfigError
from mmgpt.evaluate.bench_checkpoint import bench_checkpoint


def test_figures_are_of_one_run(tmp_path: Path) -> None:
    told = tmp_path / "figures.json"
    options = ["--gigabytes", "0.004", "--repeats", "1", "--folder", str(tmp_path), "--json", str(told)]
    assert cli.main(["bench", "checkpoint", *options]) == 0
    figures = json.loads(told.read_text())
    assert all(value > 0 for value in figures.values()) and figures["gigabytes"] == pytest.approx(0.004, rel=0.3)
    for who in ("orbax", "ours", "local"):
        assert figures[f"seconds/{who}: save"] >= figures[f"seconds/{who}: blocks"]
    ratio = figures["seconds/orbax: save"] / figures["seconds/ours: save"]
    assert figures["times faster than orbax/save"] == pytest.approx(ratio, rel=0.01)
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


@pytest.mark.parametrize(
    "options", [{"gigabytes": 0.0}, {"gigabytes": float("nan")}, {"repeats": 0}, {"interval": 0.0}]
)
def test_nothing_to_measure_is_refused(options: dict) -> None:
    with pytest.raises(ConfigError, match="above 0"):
        bench_checkpoint(**options)
