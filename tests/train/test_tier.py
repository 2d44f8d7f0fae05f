"""A restart takes the newest step that all processes can use, from each host's own folder or from the one of all."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from mmgpt.train import manifest
from mmgpt.train.checkpoint import Checkpoints, Restored
from tests.small_disk import small_disk
from tests.train.steps import abstract, holds, mesh, placed, run_together, values


def opened(tmp_path: Path, **settings: Any) -> Checkpoints:
    """The checkpoints of a run: a local step every second, of which two stay."""
    return Checkpoints.Config(local=str(tmp_path / "ram"), local_every=2, **settings).build(tmp_path / "run" / "shared")


def train(tmp_path: Path, steps: range, every: int, **settings: Any) -> None:
    """Saves as the loop does, in the shared folder every few steps."""
    with opened(tmp_path, **settings) as checkpoints:
        for step in steps:
            state = placed(values(step), mesh(4, 2))
            checkpoints.save_local(step, state, step * 8, {})
            if step % every == 0:
                checkpoints.save(step, state, step * 8, {})


def restored(tmp_path: Path, *shape: int) -> Restored | None:
    with opened(tmp_path) as checkpoints:
        found = checkpoints.restore(abstract(placed(values(0), mesh(*shape))))
    assert found is None or (holds(found.state, values(found.step)) and found.position == 8 * found.step)
    return found


def own(tmp_path: Path, process: int = 0) -> Path:
    (folder,) = (tmp_path / "ram").glob(f"*/process-{process}")
    return folder


def steps_of(found: Restored | None) -> int | None:
    return found.step if found is not None else None


def test_the_newest_step_of_both_folders_is_taken(tmp_path: Path) -> None:
    train(tmp_path, range(1, 10), every=5)
    assert sorted(os.listdir(own(tmp_path))) == ["6", "8"]
    assert sorted(os.listdir(tmp_path / "run" / "shared")) == ["5", "identity"]
    assert steps_of(restored(tmp_path, 4, 2)) == 8
    train(tmp_path, range(9, 12), every=9)
    assert steps_of(restored(tmp_path, 4, 2)) == 10
    train(tmp_path, range(11, 13), every=12)
    (tmp_path / "run" / "shared" / "12" / "commit_success.txt").unlink()  # not looked at: the same step is here
    assert steps_of(restored(tmp_path, 4, 2)) == 12
    train(tmp_path, range(13, 14), every=13)
    assert steps_of(restored(tmp_path, 4, 2)) == 13


def test_damaged_local_steps_are_set_aside_and_the_next_best_is_taken(tmp_path: Path) -> None:
    train(tmp_path, range(1, 10), every=7)
    for step, expected in ((8, 7), (6, 7)):
        path = next((own(tmp_path) / str(step)).glob("shards-*"))
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        assert steps_of(restored(tmp_path, 4, 2)) == expected
    (tmp_path / "run" / "shared" / "7" / "commit_success.txt").unlink()
    with pytest.raises(RuntimeError, match="every checkpoint is damaged"):
        restored(tmp_path, 4, 2)
    assert sorted(os.listdir(own(tmp_path))) == ["6.corrupt-1", "8.corrupt-1"]


def test_steps_of_a_future_that_was_left_are_set_aside_in_both_folders(tmp_path: Path) -> None:
    train(tmp_path, range(1, 10), every=3)
    with opened(tmp_path) as checkpoints:
        checkpoints.set_aside("abandoned", lambda found: found.position > 8 * 6)
    assert sorted(os.listdir(own(tmp_path))) == ["6", "8.abandoned-1"]
    assert sorted(os.listdir(tmp_path / "run" / "shared")) == ["3", "6", "9.abandoned-1", "identity"]
    assert steps_of(restored(tmp_path, 4, 2)) == 6
    train(tmp_path, range(7, 10), every=9)
    with opened(tmp_path) as checkpoints:
        checkpoints.set_aside("abandoned", lambda found: found.step == 9)
    assert sorted(os.listdir(own(tmp_path))) == ["6", "8"]
    assert sorted(os.listdir(tmp_path / "run" / "shared")) == ["3", "6", "9.abandoned-1", "identity"]
    assert steps_of(restored(tmp_path, 4, 2)) == 8


def test_a_lost_local_folder_or_another_mesh_falls_back_to_the_shared_one(tmp_path: Path) -> None:
    train(tmp_path, range(1, 10), every=5)
    assert steps_of(restored(tmp_path, 2, 4)) == 5
    assert sorted(os.listdir(own(tmp_path))) == ["6", "8"]
    shutil.rmtree(tmp_path / "ram")
    assert steps_of(restored(tmp_path, 4, 2)) == 5


def test_a_reader_needs_no_local_folder_and_makes_none(tmp_path: Path) -> None:
    train(tmp_path, range(1, 10), every=5)
    settings = Checkpoints.Config(local=str(tmp_path / "elsewhere"))
    with settings.build(tmp_path / "run" / "shared", read_only=True) as checkpoints:
        found = checkpoints.restore(abstract(placed(values(0), mesh(1, 1))))
    assert steps_of(found) == 5 and not (tmp_path / "elsewhere").exists()


def test_local_steps_of_another_run_and_of_a_left_future_are_not_taken(tmp_path: Path) -> None:
    train(tmp_path, range(1, 10), every=5)
    with opened(tmp_path) as checkpoints:  # the run goes back to step 5, and another way from there
        checkpoints.restore(abstract(placed(values(0), mesh(4, 2))), step=5)
        checkpoints.save_local(6, placed(values(6), mesh(4, 2)), 48, {})
    assert sorted(os.listdir(own(tmp_path))) == ["6"] and steps_of(restored(tmp_path, 4, 2)) == 6
    shutil.rmtree(tmp_path / "run")  # begun anew under the same name
    assert restored(tmp_path, 4, 2) is None


def test_a_full_local_disk_is_told_and_costs_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "run").mkdir()
    with small_disk(tmp_path / "ram", "1m") as disk:
        (disk / "filler").write_bytes(bytes(2**20 - 2**12))
        train(tmp_path, range(1, 6), every=5)
        assert "local checkpoint 4 was not saved: OSError: [Errno 28] No space left" in capsys.readouterr().err
        assert list(own(tmp_path).iterdir()) == [] and steps_of(restored(tmp_path, 4, 2)) == 5
        (disk / "filler").unlink()
        train(tmp_path, range(6, 9), every=9)
        assert steps_of(restored(tmp_path, 4, 2)) == 8


# --- several hosts, each with a folder of its own


HOSTS = """
folder, wish, first, last = Path(sys.argv[1]), json.loads(sys.argv[2]), *map(int, sys.argv[3:])
settings = Checkpoints.Config(local=str(folder / f"ram-{index}"), local_every=2)
with settings.build(folder / "run" / "shared") as checkpoints:
    found = checkpoints.restore(abstract(placed(values(0), mesh(4, 2))))
    step = found.step if found else None
    assert step == wish, (step, wish)
    assert not found or holds(found.state, values(step))
    for step in range(first, last):
        state = placed(values(step), mesh(4, 2))
        checkpoints.save_local(step, state, step * 8, {})
        if step % 5 == 0:
            checkpoints.save(step, state, step * 8, {})
    checkpoints.wait()
"""


def hosts(folder: Path, processes: int, wish: int | None, first: int = 0, last: int = 0) -> None:
    """A life of the run: it must find the step wished for, and then saves those of a range."""
    run_together("import json\n" + HOSTS, processes, str(folder), json.dumps(wish), str(first), str(last))


def local(folder: Path, process: int) -> Path:
    (found,) = folder.glob(f"ram-{process}/*/process-{process}")
    return found


@pytest.mark.multiproc
def test_two_hosts_find_the_newest_step_each_in_its_own_folder(tmp_path: Path) -> None:
    hosts(tmp_path, 2, None, 1, 10)
    for process in range(2):
        assert sorted(os.listdir(local(tmp_path, process))) == ["6", "8"]
        keys = manifest.read(local(tmp_path, process) / "8")["shards"]
        assert len([key for key in keys if key.startswith("params/kernel")]) == 4  # of 8, one on each of 4 devices
    hosts(tmp_path, 2, 8)


@pytest.mark.multiproc
@pytest.mark.parametrize(
    "fault", ["machine replaced", "killed between renames", pytest.param("damaged", marks=pytest.mark.slow)]
)
def test_a_step_that_one_host_has_not_is_not_taken(fault: str, tmp_path: Path) -> None:
    hosts(tmp_path, 2, None, 1, 10)
    newest = local(tmp_path, 1) / "8"
    if fault == "machine replaced":
        shutil.rmtree(tmp_path / "ram-1")
    elif fault == "damaged":
        (newest / "shards-0000.safetensors").write_bytes(b"")
    else:
        newest.rename(newest.with_name("8.saving"))
    hosts(tmp_path, 2, 5 if fault == "machine replaced" else 6, 7, 9)
    for process in range(2):
        assert "8" in os.listdir(local(tmp_path, process))


@pytest.mark.multiproc
def test_other_numbers_of_hosts_fall_back_to_the_shared_step_and_no_two_lives_are_mixed(tmp_path: Path) -> None:
    hosts(tmp_path, 2, None, 1, 10)
    hosts(tmp_path, 1, 5, 6, 9)
    hosts(tmp_path, 1, 8)
    hosts(tmp_path, 2, 5)  # both have a step 8, but not of the same life
