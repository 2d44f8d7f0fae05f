"""The planner held against published runs: the rows name presets that are as published, and are compared rightly."""

import pytest

from mmgpt import cli, presets
from mmgpt.bench_plan import ROWS, Compared
from mmgpt.data.loader import PackedRows
from mmgpt.plan.chips import chip_of
from mmgpt.train.run import Run


def test_each_row_has_a_preset_whose_mesh_fills_its_topology() -> None:
    for row in ROWS:
        run, chip = presets.preset(row.preset), chip_of(row.topology)
        assert isinstance(run, Run) and isinstance(run.data, PackedRows.Config)
        count = chip.whole
        for side in row.topology.split(":")[1].split("x"):
            count *= int(side)
        sizes = run.mesh.sizes(count)
        assert run.data.batch_rows % (sizes[0] * sizes[1] * run.microbatches) == 0
        doc = getattr(__import__("mmgpt.configs.published", fromlist=["x"]), row.preset).__doc__
        assert f"{row.tokens:,.0f}" in doc or f"{row.tokens}" in doc
        assert row.topology in doc


def test_the_deviation_is_of_the_measured_speed() -> None:
    assert Compared(row=ROWS[0], planned=ROWS[0].tokens * 1.1, utilisation=0.4).deviation == pytest.approx(0.1)


def test_an_unknown_row_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "plan", "--only", "gpt"]) == 1
    assert "--only gpt: one of llama3_8b_v6e_256" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_told_before_anything_compiles(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "plan", "--only", ROWS[0].preset, "--json", "/dev/null/figures.json"]) == 1
    assert "/dev/null is no folder" in capsys.readouterr().err
