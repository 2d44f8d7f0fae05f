"""A few of the faults that `python -m tests.soak.checkpoints` makes by the hundred."""

from pathlib import Path

import pytest

from tests.soak.checkpoints import HARMS, World, cuts, flips, refused
from tests.train.steps import finish, run

WHERE = pytest.mark.parametrize("local", [False, True], ids=["shared", "local"])


@WHERE
def test_every_flipped_bit_is_found(local: bool, tmp_path: Path) -> None:
    world = World(tmp_path, local)
    assert len(world.files()) == (2 if local else 9)
    assert list(flips(world, 10 if local else 40, seed=1)) == [""] * (10 if local else 40)
    assert world.newest() == 2


@WHERE
def test_every_file_that_is_gone_or_cut_is_found(local: bool, tmp_path: Path) -> None:
    world = World(tmp_path, local)
    said = list(cuts(world))
    assert len(said) == (8 if local else 33) and not any(said)
    assert world.newest() == 2


@pytest.mark.parametrize("name", HARMS)
def test_a_folder_that_was_made_to_harm_is_refused(name: str, tmp_path: Path) -> None:
    said = refused(tmp_path, name)
    assert str(tmp_path) in said and len(said) < 600


def test_what_unpacks_to_a_gigabyte_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    measured = """
from tests.soak.checkpoints import peak, refused
refused(Path(sys.argv[1]) / "first", "an empty index")
before = peak()
refused(Path(sys.argv[1]) / "second", "a compressed piece of 1 GB")
print(peak() - before)
"""
    assert int(finish(run(measured, str(tmp_path)))) < 200
