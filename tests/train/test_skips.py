"""The order of rows with some left out, against a list of all of them."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmgpt.train.skips import NAME, Skip, SkipError, Skips

ROWS = 4


def skips(ranges: list[tuple[int, int]]) -> Skips:
    """Of ranges in batches."""
    about = {"why": "a test", "first_step": 1, "last_step": 2, "time": 0.5}
    return Skips(ROWS, tuple(Skip(first_row=ROWS * a, stop_row=ROWS * b, **about) for a, b in ranges))  # pyright: ignore


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)).map(lambda r: (r[0], r[0] + r[1])), max_size=5))
def test_rows_come_in_order_without_those_left_out(ranges: list[tuple[int, int]]) -> None:
    left_out = {batch for first, stop in ranges for batch in range(first, stop)}
    order = [batch for batch in range(120) if batch not in left_out]
    made = skips(ranges)
    for step, batch in enumerate(order[:40]):
        assert made.row(step) == ROWS * batch
        assert made.step(ROWS * batch) == step
        assert made.step(ROWS * (batch + 1)) == step + 1  # as saved by a run that did not skip what comes next
        runs = ((a, 480 if b is None else b) for a, b in made.kept(ROWS * batch))
        found = itertools.chain.from_iterable(range(a, b, ROWS) for a, b in runs)
        assert list(found) == [ROWS * later for later in order[step:]]


def test_a_step_of_a_future_given_up_is_at_no_row_of_its_own() -> None:
    made = skips([(10, 15)])
    assert [step for step in range(30) if made.step(ROWS * step) == step] == list(range(11))


def test_the_record_comes_back_as_it_was(tmp_path: Path) -> None:
    assert Skips.load(tmp_path, ROWS) == Skips(ROWS)
    made = skips([(10, 15), (3, 4)])
    made.save(tmp_path)
    assert Skips.load(tmp_path, ROWS) == made
    assert len((tmp_path / NAME).read_text().splitlines()) == 2


@pytest.mark.parametrize("line", ["", "[]", "{}", "\x00", '{"first_row": 1}'])
def test_a_record_that_was_damaged_is_told(tmp_path: Path, line: str) -> None:
    skips([(3, 4)]).save(tmp_path)
    with open(tmp_path / NAME, "a") as file:
        file.write(line + "\n")
    with pytest.raises(SkipError, match=rf"{NAME}:2: not a record of skipped rows"):
        Skips.load(tmp_path, ROWS)


def test_rows_of_another_batch_size_are_told(tmp_path: Path) -> None:
    skips([(3, 4)]).save(tmp_path)
    with pytest.raises(SkipError, match="rows 12 to 16 are not whole batches of 5 rows"):
        Skips.load(tmp_path, 5)


def test_numbers_for_the_metrics() -> None:
    told = skips([(3, 4), (10, 15)]).told()
    assert told == {"rollbacks": 2, "first_row": 40, "stop_row": 60, "first_step": 1, "last_step": 2}
    assert all(isinstance(value, float) and np.isfinite(value) for value in told.values())
