"""The tokenizer's benchmark measures two models that do the same."""

import json
from pathlib import Path

import pytest

from mmgpt.cli import main

pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.mark.slow
def test_both_find_the_same_codes_and_pixels_and_are_timed(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    sizes = ["--channels", "32", "--side", "32", "--pictures", "2", "--frames", "4", "--repeats", "1"]
    assert main(["bench", "tokenizer", *sizes, "--json", str(out)]) == 0
    figures = json.loads(out.read_text())
    for name in ("pictures", "clip"):
        assert figures[f"{name}/codes equal"] == 1.0
        assert figures[f"{name}/pixels apart, of their range"] < 1e-4
        assert all(
            figures[f"{name}/seconds/{who}/{what}"] > 0 for who in ("ours", "theirs") for what in ("encode", "decode")
        )
        assert figures[f"{name}/times faster/both"] > 0


def test_sizes_that_do_not_divide_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "tokenizer", "--side", "100"]) == 1
    assert "multiple of 8" in capsys.readouterr().err
