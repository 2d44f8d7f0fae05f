"""Mixed faults, one after another: the short form of `python -m tests.soak.faults`."""

from pathlib import Path

import pytest

from tests.soak.faults import soak


@pytest.mark.slow
def test_a_run_ends_in_the_same_bits_whatever_it_meets(tmp_path: Path) -> None:
    told = soak(20, 2, tmp_path)
    assert told["faults"] >= 20 and len(told["by kind"]) >= 6
