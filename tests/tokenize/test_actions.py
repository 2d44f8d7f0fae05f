"""An action tokenizer is trained from the datasets of a robot by one command, and the import's actions come back."""

from pathlib import Path

import numpy as np
import pytest

from mmgpt.cli import main
from mmgpt.core.document import Action
from mmgpt.data.importing import import_dataset
from mmgpt.data.record import Dataset
from mmgpt.tokens import actions

FIXTURE = "tests/data/fixtures/episodes"


@pytest.fixture
def episodes(root: Path, tmp_path: Path) -> Path:
    return import_dataset("episodes", root / FIXTURE, tmp_path / "episodes").directory


def test_a_tokenizer_of_imported_episodes(episodes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "actions.json"
    assert main(["tokenize", "actions", str(episodes), "--out", str(out), "--size", "128"]) == 0
    trained = actions.load(out)
    assert trained.dims == 3 and f"{trained.size} tokens for actions of 3 dimensions" in capsys.readouterr().err
    for segment in Dataset(episodes)[1].segments:
        if isinstance(segment, Action) and segment.values is not None:
            back = trained.decode(trained.encode(segment.values), *segment.values.shape)
            assert np.abs(back - segment.values).mean() < 0.1
    before = out.read_bytes()
    assert main(["tokenize", "actions", str(episodes), "--out", str(out), "--size", "256"]) == 1
    assert "--overwrite True" in capsys.readouterr().err and out.read_bytes() == before
    assert main(["tokenize", "actions", str(episodes), "--out", str(out), "--size", "256", "--overwrite", "True"]) == 0


def test_datasets_without_actions_are_told(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    import_dataset("jsonl", root / "tests/data/fixtures/jsonl", tmp_path / "stories")
    assert main(["tokenize", "actions", str(tmp_path / "stories"), "--out", str(tmp_path / "a.json")]) == 1
    assert "no actions to train on" in capsys.readouterr().err and not (tmp_path / "a.json").exists()
