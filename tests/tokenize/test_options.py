"""Wrong options of `mmgpt tokenize data` are told before a tokenizer is opened."""

from pathlib import Path

import pytest

from mmgpt import cli


def test_wrong_options_are_told_before_anything_is_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    files = ["--text", str(tmp_path / "none"), "--vision", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    for options, expected, code in (
        ((), "no dataset is named", 2),
        ((str(tmp_path), "--threads", "-3"), "--threads is -3", 1),
    ):
        assert cli.main(["tokenize", "data", *files, *options]) == code
        assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
