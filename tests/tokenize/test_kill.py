"""The whole command, killed at random moments; MMGPT_KILLS says how often."""

import os

import pytest

from tests.tokenize import kill_tokenize, small_job


@pytest.mark.slow
def test_a_job_that_is_killed_often_makes_the_same_bytes(tmp_path):
    small_job.make(tmp_path)
    counts = kill_tokenize.kill_often(tmp_path, int(os.environ.get("MMGPT_KILLS", "6")), seed=1)
    assert counts["in the middle"] >= 1
