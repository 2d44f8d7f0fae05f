"""A run folder that all tests of a process share; they only read it, or write to its eval/."""

from pathlib import Path

import pytest

from tests import tiny_run


@pytest.fixture(scope="session")
def model_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.shared(tmp_path_factory.getbasetemp())
