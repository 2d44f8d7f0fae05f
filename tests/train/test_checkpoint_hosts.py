"""A step moves between meshes and numbers of processes, and the newest that all of them can use is loaded."""

import os
from pathlib import Path

import jax
import pytest

from mmgpt.train import manifest
from mmgpt.train.checkpoint import Checkpoints
from tests.small_disk import small_disk
from tests.train.steps import abstract, holds, mesh, placed, run_together, values


def test_a_step_loads_on_other_meshes_bit_for_bit(tmp_path: Path) -> None:
    with Checkpoints.Config().build(tmp_path) as checkpoints:
        checkpoints.save(3, placed(values(3), mesh(4, 2)), 24, {})
        for shape in [(2, 4), (8, 1), (1, 8), (2, 2), (4, 1), (1, 1)]:
            wanted = abstract(placed(values(0), mesh(*shape)))
            restored = checkpoints.restore(wanted)
            assert restored is not None and holds(restored.state, values(3))
            assert jax.tree.all(jax.tree.map(lambda x, w: x.sharding == w.sharding, restored.state, wanted))


SAVE = """
with Checkpoints.Config().build(Path(sys.argv[1])) as checkpoints:
    checkpoints.save(3, placed(values(3), mesh(4, 2)), 24, {})
    assert checkpoints.wait()
"""
LOAD = """
with Checkpoints.Config().build(Path(sys.argv[1])) as checkpoints:
    for shape in [(4, 2), (2, 4), (8, 1)]:
        restored = checkpoints.restore(abstract(placed(values(0), mesh(*shape))))
        assert restored is not None and restored.position == 24 and holds(restored.state, values(3)), shape
"""


@pytest.mark.multiproc
@pytest.mark.parametrize(("savers", "loaders"), [(2, 1), (1, 2), pytest.param(2, 4, marks=pytest.mark.slow)])
def test_a_step_loads_on_other_numbers_of_processes(savers: int, loaders: int, tmp_path: Path) -> None:
    run_together(SAVE, savers, str(tmp_path))
    assert len(list((tmp_path / "3" / "state").glob("ocdbt.process_*"))) == savers
    assert manifest.read(tmp_path / "3")["files"].keys() == manifest.files(tmp_path / "3")
    run_together(LOAD, loaders, str(tmp_path))


TWO = """
folder = Path(sys.argv[1])
checkpoints = Checkpoints.Config(keep=2).build(folder)
whole = lambda step: placed(values(step), mesh(4, 2))
for step in (1, 2, 3):
    checkpoints.save(step, whole(step), step, {})
checkpoints.wait()
hosts.barrier("saved")
assert checkpoints.steps() == [2, 3]
hosts.barrier("seen")
if index == 1:  # damage in a file that only this process hashes; the lead must hear of it
    second = sorted(p for p in (folder / "3").rglob("*") if p.is_file() and p.name != "manifest.json")[1]
    second.write_bytes(second.read_bytes()[:-1])
hosts.barrier("cut")
restored = checkpoints.restore(abstract(whole(0)))
assert restored.step == 2 and restored.position == 2 and holds(restored.state, values(2))
checkpoints.save(3, whole(5), 5, {})
checkpoints.close()
"""


@pytest.mark.multiproc
def test_two_processes_save_together_and_walk_back_together(tmp_path: Path) -> None:
    run_together(TWO, 2, str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["2", "3", "3.corrupt-1"]
    with Checkpoints.Config().build(tmp_path) as checkpoints:
        restored = checkpoints.restore(abstract(placed(values(0), mesh(1, 1))))
    assert restored is not None and restored.position == 5 and holds(restored.state, values(5))


FAIL = """
from mmgpt.train import tier
folder = Path(sys.argv[1])
noise = lambda step: np.random.default_rng(step).standard_normal((512, 512)).astype(np.float32)
state = lambda step: placed({"w": noise(step)}, mesh(4, 2))
found = lambda: checkpoints.restore(abstract(state(0))).step

with Checkpoints.Config().build(folder / "run") as checkpoints:
    checkpoints.save(1, state(1), 8, {})
    assert checkpoints.wait()
    hosts.barrier("saved")
    if index == 0:
        (folder / "filler").write_bytes(bytes(1_600_000))
    hosts.barrier("full")
    checkpoints.save(2, state(2), 16, {})
    assert not checkpoints.wait() and checkpoints.failures == 1 and found() == 1
    hosts.barrier("failed")
    if index == 0:
        (folder / "filler").unlink()
    hosts.barrier("room")
    if index == 1:  # one process alone fails
        tier.manifest.hashes = lambda *_: 1 / 0
    checkpoints.save(3, state(3), 24, {})
    assert not checkpoints.wait() and checkpoints.failures == 2
    print(type(checkpoints.failure).__name__)
"""


@pytest.mark.multiproc
def test_what_one_process_cannot_save_none_has_saved(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "3m") as disk:
        assert [out.split()[-1] for out in run_together(FAIL, 2, str(disk))] == ["Elsewhere", "ZeroDivisionError"]
        assert os.listdir(disk / "run") == ["1"]
