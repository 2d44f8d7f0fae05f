"""No change to the files of a step goes unnoticed; the step before it is loaded and the damaged one is kept."""

import json
import os
import shutil
from pathlib import Path

import pytest

from mmgpt.train import manifest
from mmgpt.train.checkpoint import CheckpointError, Checkpoints
from tests.train.steps import abstract, make_state, restore, same, save_steps


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with steps 1 and 2, to copy."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    save_steps(folder, 1, 2)
    return folder


@pytest.fixture
def folder(two_steps: Path, tmp_path: Path) -> Path:
    return shutil.copytree(two_steps, tmp_path / "checkpoints")


def assert_walks_back(folder: Path) -> None:
    restored = restore(folder)
    assert restored is not None and restored.step == 1 and same(restored.state, make_state(1))
    assert sorted(os.listdir(folder)) == ["1", "2.corrupt-1"]


def test_a_manifest_that_was_edited_is_found_although_it_is_json(folder: Path) -> None:
    path = folder / "2" / manifest.NAME
    body = json.loads(path.read_text())
    body["position"] = 17
    path.write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")
    assert_walks_back(folder)


def test_damaged_steps_are_kept_under_new_names_and_the_last_one_is_not_passed_over(folder: Path) -> None:
    for _ in range(2):
        (folder / "2" / "state" / "_METADATA").write_bytes(b"")
        restored = restore(folder)
        assert restored is not None and restored.step == 1
        save_steps(folder, 2)
    for step in (1, 2):
        (folder / str(step) / "state" / "_METADATA").unlink()
    for _ in range(2):  # a restarted run must not begin anew by itself
        with pytest.raises(CheckpointError, match=r"every checkpoint is damaged.*.*To start anew"):
            restore(folder)
    assert sorted(os.listdir(folder)) == ["1.corrupt-1", "2.corrupt-1", "2.corrupt-2", "2.corrupt-3"]


def test_a_named_step_is_that_one_or_an_error(folder: Path) -> None:
    (folder / "2" / "commit_success.txt").unlink()
    with pytest.raises(CheckpointError, match=r"commit_success\.txt is gone"):
        restore(folder, step=2)
    with pytest.raises(CheckpointError, match="step 5 is not there"):
        restore(folder, step=5)
    assert sorted(os.listdir(folder)) == ["1", "2"]


def test_a_reader_beside_the_run_changes_nothing(folder: Path) -> None:
    (folder / "2" / "state" / "_METADATA").write_bytes(b"x")
    (folder / "3.saving.orbax-checkpoint-tmp").mkdir()
    before = sorted(p.relative_to(folder) for p in folder.rglob("*"))
    with Checkpoints.Config().build(folder, read_only=True) as checkpoints:
        restored = checkpoints.restore(abstract(make_state(0)))
        assert restored is not None and restored.step == 1
        with pytest.raises(CheckpointError, match="read only"):
            checkpoints.save(3, make_state(3), 0, {})
    assert sorted(p.relative_to(folder) for p in folder.rglob("*")) == before


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert restore(tmp_path / "new") is None
    with Checkpoints.Config().build(tmp_path / "none", read_only=True) as checkpoints:
        assert checkpoints.restore(abstract(make_state(0))) is None and checkpoints.describe() is None
