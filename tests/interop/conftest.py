"""A small checkpoint, published and as a run, that all tests of a process share."""

import shutil
from pathlib import Path

import pytest

from mmgpt.interop.convert import convert


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two layers, to be copied before it is changed; skips where torch is not installed."""
    from tests.interop import reference

    model = reference.drawn(reference.llama(num_hidden_layers=2))
    return reference.save(model, tmp_path_factory.mktemp("llama") / "hf")


@pytest.fixture(scope="session")
def converted(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a run, to be copied before it is changed."""
    folder = tmp_path_factory.mktemp("converted") / "run"
    convert(llama, folder)
    return folder


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(llama, tmp_path / "hf")
