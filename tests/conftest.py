"""What every test runs under: the CPU as eight devices, strict shapes, and a cache of compiled functions."""

import os
from pathlib import Path

import hypothesis
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")

hypothesis.settings.register_profile("mmgpt", deadline=None)  # a busy machine is no fault of the code
hypothesis.settings.load_profile("mmgpt")

# Nor is it where eight devices do not meet within 40 s, after which XLA would end the process.
_patient = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_patient}".strip()


def pytest_addoption(parser: pytest.Parser) -> None:
    where = "../shared/schemas/jobset.x-k8s.io_jobsets.yaml"
    parser.addoption("--jobset-schema", default=where, help=f"JobSet's custom resource definition; by default {where}")


def pytest_configure(config: pytest.Config) -> None:
    """Settings that must stand before the first test imports JAX.

    Those in the environment hold in processes that a test starts too; the number of devices holds here only.
    """
    # One folder per test process: JAX does not write entries atomically.
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    cache = getattr(config, "cache", None)  # absent under -p no:cacheprovider
    if cache is not None:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache.mkdir(f"jax-{worker}"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

    import jax

    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is also the working directory of the test."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder
