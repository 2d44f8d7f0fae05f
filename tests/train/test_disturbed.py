"""Runs that are killed or preempted end as undisturbed ones: short forms of the soaks in `tests/soak`."""

from pathlib import Path

import pytest

from tests.soak import kills, preemptions


def test_a_run_is_killed_in_its_start_a_step_and_a_save(tmp_path: Path) -> None:
    assert len(kills.soak(3, 0, "1", tmp_path, steps=20)) == 3


@pytest.mark.slow
@pytest.mark.multiproc
def test_one_of_two_processes_is_killed_or_hangs_and_another_number_goes_on(tmp_path: Path) -> None:
    assert len(kills.soak(4, 1, "mixed", tmp_path)) == 4


@pytest.mark.parametrize("moment", ["evaluation", pytest.param("compile", marks=pytest.mark.slow)])
def test_one_process_is_preempted(moment: str, tmp_path: Path) -> None:
    assert len(preemptions.soak(1, 0, tmp_path, (moment,))) == 1


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize("moment", ["evaluation", "save", "data"])
def test_one_and_two_processes_are_preempted(moment: str, tmp_path: Path) -> None:
    assert len(preemptions.soak(2, 1, tmp_path, (moment,))) == 2
