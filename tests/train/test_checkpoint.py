"""A checkpoint loads exactly as it was saved or not at all, whatever happens to the disk, the process or the mesh."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmgpt.core.config import ConfigError
from mmgpt.train import manifest
from mmgpt.train.checkpoint import CheckpointError, Checkpoints
from tests.small_disk import small_disk
from tests.train.steps import abstract, finish, make_state, restore, run, same, save_steps


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with steps 1 and 2, to copy."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    save_steps(folder, 1, 2)
    return folder


@pytest.fixture
def folder(two_steps: Path, tmp_path: Path) -> Path:
    return shutil.copytree(two_steps, tmp_path / "checkpoints")


# --- what is saved is what is loaded


def test_a_step_loads_as_it_was_saved(folder: Path) -> None:
    for step in (1, 2):
        restored = restore(folder, step=step)
        assert restored is not None and same(restored.state, make_state(step))
        assert (restored.step, restored.position, restored.meta) == (step, step * 8, {"config": f"hash {step}"})
    newest = restore(folder)
    assert newest is not None and newest.step == 2


def test_arrays_may_be_donated_once_save_returns(tmp_path: Path) -> None:
    donate = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    with Checkpoints.Config().build(tmp_path) as checkpoints:
        state = {"big": jnp.arange(4_000_000, dtype=jnp.float32), "small": jnp.arange(3)}
        template, expected = abstract(state), jax.tree.map(np.array, state)
        checkpoints.save(1, state, 0, {})
        for _ in range(3):
            state = jax.tree.map(donate, state)
        restored = checkpoints.restore(template)
    assert restored is not None and same(restored.state, expected)


def test_parts_load_alone_and_need_no_sharding(folder: Path) -> None:
    wanted = jax.eval_shape(lambda: make_state(0))
    restored = restore(folder, only=("ema", "params"))
    assert restored is not None and same(restored.state, {k: make_state(2)[k] for k in ("ema", "params")})
    with Checkpoints.Config().build(folder, read_only=True) as checkpoints:
        restored = checkpoints.restore({"params": wanted["params"]}, only=("params",))
        assert restored is not None and same(restored.state, {"params": make_state(2)["params"]})


def test_a_description_needs_no_arrays(folder: Path) -> None:
    with Checkpoints.Config().build(folder, read_only=True) as checkpoints:
        newest, first = checkpoints.describe(), checkpoints.describe(1)
        assert newest is not None and first is not None
        assert (newest.step, newest.position, first.meta) == (2, 16, {"config": "hash 1"})
        assert newest.tree["params/scale"] == "bfloat16[5]" and newest.tree["optimizer/count"] == "int32[]"
        with pytest.raises(CheckpointError, match=r"step 9 is not there; complete: \[1, 2\]"):
            checkpoints.describe(9)


def test_old_steps_go_and_permanent_ones_stay(tmp_path: Path) -> None:
    save_steps(tmp_path, *range(1, 10), keep=2, keep_every=4)
    assert sorted(os.listdir(tmp_path)) == ["4", "8", "9"]


def test_a_saved_step_is_replaced_by_a_later_run_and_not_written_twice_by_this_one(folder: Path) -> None:
    with Checkpoints.Config().build(folder) as checkpoints:
        checkpoints.save(2, make_state(7), 1, {"again": True})
        checkpoints.save(2, make_state(8), 2, {})
    restored = restore(folder)
    assert restored is not None and (restored.step, restored.position) == (2, 1)
    assert same(restored.state, make_state(7))
    assert sorted(os.listdir(folder)) == ["1", "2"]


def test_a_synchronous_save_is_complete_when_it_returns(tmp_path: Path) -> None:
    checkpoints = Checkpoints.Config(asynchronous=False).build(tmp_path)
    checkpoints.save(1, make_state(1), 8, {})
    assert checkpoints.steps() == [1]


# --- the caller's mistakes


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s["params"].update(kernel=jnp.zeros((6, 4))), ["params/kernel", "float32[4,6]", "float32[6,4]"]),
        (lambda s: s["params"].update(scale=jnp.zeros(5)), ["params/scale", "bfloat16[5]", "float32[5]"]),
        (lambda s: s["ema"].update(extra=jnp.zeros(2)), ["ema/extra", "nothing", "float32[2]"]),
        (lambda s: s.pop("flag"), ["flag", "bool[]", "nothing"]),
    ],
)
def test_another_config_is_refused_with_the_names_and_nothing_is_set_aside(
    folder: Path, change: Callable[[dict[str, Any]], None], named: list[str]
) -> None:
    other = make_state(0)
    change(other)
    with Checkpoints.Config().build(folder) as checkpoints:
        with pytest.raises(CheckpointError, match="another config: 1 of") as e:
            checkpoints.restore(abstract(other))
        assert all(word in str(e.value) for word in named)
        assert checkpoints.steps() == [1, 2]


def test_a_state_that_cannot_be_saved_is_an_error_with_its_name(tmp_path: Path) -> None:
    with Checkpoints.Config().build(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match=r"params/n: expected an array, found int"):
            checkpoints.save(1, {"params": {"n": 3}}, 0, {})
        with pytest.raises(CheckpointError, match=r"params/n: shape \(0, 4\) has no elements"):
            checkpoints.save(1, {"params": {"n": jnp.zeros((0, 4))}}, 0, {})
        with pytest.raises(TypeError, match="not JSON serializable"):
            checkpoints.save(1, make_state(1), 0, {"path": tmp_path})
        checkpoints.save(1, make_state(1), 0, {})
        assert checkpoints.wait() and checkpoints.steps() == [1]


def test_fewer_steps_than_one_can_walk_back_over_are_refused(tmp_path: Path) -> None:
    for name, least in {"keep": 2, "keep_every": 1, "local_every": 1, "local_keep": 2}.items():
        changes: dict[str, Any] = {name: least - 1}
        with pytest.raises(ConfigError, match=f"{name} is {least - 1}; it must be at least {least}"):
            Checkpoints.Config(**changes).build(tmp_path)


# --- a full disk


def test_a_full_disk_costs_one_step_and_the_next_save_works(tmp_path: Path) -> None:
    def state(step: int) -> dict[str, Any]:
        noise = np.random.default_rng(step).standard_normal(200_000).astype(np.float32)
        return {"params": {"kernel": jnp.asarray(noise)}}

    with small_disk(tmp_path / "disk", "3m") as disk, Checkpoints.Config().build(disk / "run") as checkpoints:
        checkpoints.save(1, state(1), 8, {})
        assert checkpoints.wait()
        filler = disk / "filler"
        filler.write_bytes(bytes(1_700_000))
        for failures in (1, 2):
            checkpoints.save(1 + failures, state(2), 16, {})
            assert not checkpoints.wait() and checkpoints.failures == failures
            assert sorted(os.listdir(disk / "run")) == ["1"]
        restored = checkpoints.restore(abstract(state(0)))
        assert restored is not None and restored.step == 1 and same(restored.state, state(1))
        filler.unlink()
        checkpoints.save(4, state(4), 32, {})
        assert checkpoints.wait() and checkpoints.failures == 0 and checkpoints.steps() == [1, 4]
        restored = checkpoints.restore(abstract(state(0)))
        assert restored is not None and same(restored.state, state(4))


# --- kills


def test_what_a_kill_leaves_behind_is_cleaned_and_never_loaded(folder: Path) -> None:
    shutil.copytree(folder / "2", folder / "3.saving")
    shutil.copytree(folder / "2", folder / "4.saving.orbax-checkpoint-tmp")
    shutil.copytree(folder / "2", folder / "5.deleting")
    shutil.copytree(folder / "2", folder / "6")
    (folder / "6" / manifest.NAME).unlink()
    with Checkpoints.Config().build(folder) as checkpoints:
        assert checkpoints.steps() == [1, 2]
    assert sorted(os.listdir(folder)) == ["1", "2", "6.corrupt-1"]


SAVE_FOREVER = """
checkpoints = Checkpoints.Config(keep=2, keep_every=50).build(Path(sys.argv[1]))
restored = checkpoints.restore(abstract(make_state(0)))
step = 0
if restored:
    step = restored.step
    assert restored.position == step * 8 and same(restored.state, make_state(step)), "wrong state"
assert not [p for p in Path(sys.argv[1]).iterdir() if not p.name.isdecimal()], "leftovers"
if sys.argv[2] == "check":
    checkpoints.close()
    print("found", step)
    sys.exit()
while True:
    step += 1
    checkpoints.save(step, make_state(step), step * 8, {})
    print("saving", step, flush=True)
"""


def kill_and_resume(folder: Path, kills: int, seed: int) -> None:
    draw = random.Random(seed)
    announced = 0
    for _ in range(kills):
        process = run(SAVE_FOREVER, str(folder), "save")
        assert process.stdout is not None
        for _ in range(2):  # the save before the one that is announced is complete
            line = process.stdout.readline()
            assert line.startswith("saving"), process.communicate()[1][-3000:]
        time.sleep(draw.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        whole, _, _ = process.stdout.read().rpartition("\n")  # the kill may cut the last line
        lines = [line, *whole.splitlines()]
        process.communicate()
        announced = int(lines[-1].split()[1])
        steps = sorted(int(p.parent.name) for p in folder.glob(f"*/{manifest.NAME}") if p.parent.name.isdecimal())
        # `announced` was in flight and may be there or not; the one before it must be.
        assert steps[-1] in (announced - 1, announced, announced + 1)
    assert finish(run(SAVE_FOREVER, str(folder), "check")).split()[-1] == str(steps[-1])


def test_a_kill_at_any_time_costs_at_most_the_save_in_flight(tmp_path: Path) -> None:
    kill_and_resume(tmp_path / "run", kills=1, seed=1)


@pytest.mark.slow
def test_20_kills_at_any_time_cost_at_most_the_saves_in_flight(tmp_path: Path) -> None:
    kill_and_resume(tmp_path / "run", kills=20, seed=2)


# --- readers beside a living run


def test_a_step_that_the_run_deletes_under_a_reader_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    verify, waits = manifest.verify, ["before", "after"]

    def slowly(step: Path, *arguments: Any) -> None:
        wait = waits.pop() if waits else ""
        if wait != "before":
            verify(step, *arguments)
        while wait and step.exists():
            time.sleep(0.01)
        if wait == "before":
            verify(step, *arguments)

    monkeypatch.setattr(manifest, "verify", slowly)
    writer = run(SAVE_FOREVER, str(tmp_path), "save")
    try:
        assert writer.stdout is not None and [writer.stdout.readline() for _ in range(2)][1] == "saving 2\n"
        with Checkpoints.Config().build(tmp_path, read_only=True) as checkpoints:
            restored = checkpoints.restore(abstract(make_state(0)))
        assert restored is not None and same(restored.state, make_state(restored.step)) and not waits
        assert writer.poll() is None and capsys.readouterr().err == ""
    finally:
        writer.kill()
        writer.communicate()


def test_a_reader_gives_up_when_steps_go_faster_than_it_reads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verify = manifest.verify

    def replaced(step: Path, *arguments: Any) -> None:  # as by a run that saves the same step again
        shutil.copytree(step, step.with_name("copy"))
        shutil.rmtree(step)
        step.with_name("copy").rename(step)
        (step / "commit_success.txt").unlink(missing_ok=True)
        verify(step, *arguments)

    monkeypatch.setattr(manifest, "verify", replaced)
    told = pytest.raises(CheckpointError, match=r"deleted faster than they can be read; raise checkpoint\.keep")
    with Checkpoints.Config().build(folder, read_only=True) as checkpoints, told:
        checkpoints.restore(abstract(make_state(0)))
