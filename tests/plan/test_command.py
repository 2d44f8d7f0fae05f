"""`mmgpt plan` as it is typed: what it tells, what it refuses, what a search prints and chooses."""

import json
from pathlib import Path

import pytest

from mmgpt import cli

pytest.importorskip("libtpu", reason="compiles for TPUs: pip install libtpu")
SMALL = ["model.layers=2", "model.embed=512", "model.mlp=1024", "model.heads=4", "model.kv_heads=2", "model.vocab=4096"]
SMALL += ["data.row_length=2048", "data.batch_rows=8", "mesh.fsdp=4", "mesh.replica=1"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["emu3_0_1b", "--topology", "v5p:2x2"], "a v5p has 3 dimensions, as in v5p:4x4x4"),
        (["emu3_0_1b", "--topology", "v9:2x2"], "chips are v4, v5e, v5p, v6e, tpu7x"),
        (["emu3_0_1b", "--topology", "v5p:2x2x1", "--search", "0"], "--search is 0"),
        (["emu3_0_1b", "--topology", "v5p:2x2x1", *SMALL, "data.batch_rows=6"], "data.batch_rows 6 is no multiple"),
        (["emu3_0_1b", "--topology", "v5p:2x2x1", *SMALL, "mesh.fsdp=3"], "multiply to the 4 devices"),
        (["emu3_0_1b", "--topology", "v5p:2x2x1", *SMALL, "--documents", "two"], "one of 4.1k, 1-2k"),
        (
            ["emu3_0_1b", "--topology", "v5p:2x2x1", *SMALL, "mesh.fsdp=8", "--slices", "2"],
            "--mesh.replica to a multiple of 2",
        ),
        (
            ["mistral_7b_v6e_8", "--topology", "v5p:2x2x1", "model.vocab=4096"],
            "objective.vocab is 32768, and the model",
        ),
        (["quickstart_vision", "--topology", "v5p:2x2x1"], "a plan is of a decoder"),
        (["quickstart", "--topology", "v5p:2x2x1"], "runs a recipe"),
        (["emu3_0_1b", "--topology", "v5p:2x2x1", *SMALL, "--search", "-3"], "--search is -3"),
        (["emu3_0_1b", "--topology", "v5p:2x2x1", *SMALL, "--microbatches", "0"], "microbatches is 0; it must be"),
        (["emu3_0_1b", "--topology", "v5p:2x2x1", *SMALL, "--slices", "0"], "--slices is 0; it must be"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_cannot_be_planned_is_told(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *arguments]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_search_compiles_what_is_promising_and_tells_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    assert cli.main(["plan", "emu3_0_1b", "--topology", "v5p:2x2x1", *SMALL, "--search", "1", "--json", str(path)]) == 0
    captured = capsys.readouterr()
    told = captured.out + captured.err
    best = json.loads(path.read_text())
    assert "what was compiled" in told and "time of a step" in told
    mesh = " ".join(f"--mesh.{axis} {size}" for axis, size in best["mesh"].items())
    assert f"the best: {mesh} --microbatches" in told
    assert 0.0 < best["utilisation"] < 1.0 and best["memory_share"] < 1.0
