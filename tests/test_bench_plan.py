"""The planner held against published runs: the rows name presets that are as published, and are compared rightly."""

import dataclasses

import pytest

from mmgpt import cli, presets
from mmgpt.bench_plan import ROWS, SPLASH, Compared, with_splash
from mmgpt.data.loader import PackedRows
from mmgpt.models.decoder import Decoder
from mmgpt.plan import report
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


def test_deviations_are_of_the_measured_speed() -> None:
    tokens = ROWS[0].tokens
    compared = Compared(row=ROWS[0], planned=tokens * 1.1, utilisation=0.4, splash=tokens * 0.9)
    assert compared.deviations == pytest.approx((0.1, -0.1))


@pytest.mark.slow
def test_splash_takes_its_share_of_the_peak_and_the_rest_stays() -> None:
    pytest.importorskip("libtpu", reason="compiles for TPUs: pip install libtpu")
    base = presets.preset("emu3_0_1b")
    assert isinstance(base, Run) and isinstance(base.model, Decoder.Config) and isinstance(base.data, PackedRows.Config)
    sizes = {"layers": 3, "embed": 512, "mlp": 1024, "heads": 4, "kv_heads": 2, "head_dim": 128, "vocab": 4096}
    run = base.replace(
        model=dataclasses.replace(base.model, **sizes, dropout=0.0),
        data=base.data.replace(row_length=2048, batch_rows=8),
        mesh=base.mesh.replace(replica=1, fsdp=4),
    )
    made = report.plan(run, "v5p:2x2x1", documents="one")
    rest = made.told.seconds - made.told.by_what["attention"]
    cells = 3 * 1024 * 1024  # of four blocks the lower three
    share_forward, share_backward = SPLASH["v5p"]
    product = 2 * cells * 128 * 4 * 2  # of four heads, two rows on each chip
    splash = 3 * (2 * product / share_forward + 5 * product / share_backward) / made.chip.peak
    assert with_splash(made, run) - rest == pytest.approx(splash)


def test_an_unknown_row_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "plan", "--only", "gpt"]) == 1
    assert "--only gpt: one of llama3_8b_v6e_256" in capsys.readouterr().err
    assert cli.main(["bench", "plan", "--only"]) == 2
    assert "--only names no preset: one of llama3_8b_v6e_256" in capsys.readouterr().err
