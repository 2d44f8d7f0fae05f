"""Why there is no compiler for a pod: libtpu is missing, is held, knows no such pod, or is of another JAX."""

import importlib.metadata
import importlib.util

import jax
import pytest
from jax.experimental import topologies

from mmgpt.core.config import ConfigError
from mmgpt.plan.chips import devices

NOT_DIVISIBLE = (
    'INVALID_ARGUMENT: Topology layout "v5e:3x5" is not divisible by the given (or default) chips_per_host_bounds '
    '"2x2x1"'
)
HELD = "ABORTED: Internal error when accessing libtpu multi-process lockfile."
OURS = "0.0.42.1"
"""A version that fits either JAX here."""


@pytest.mark.parametrize(
    ("raised", "libtpu", "told"),
    [
        (NOT_DIVISIBLE, OURS, "'v5e:3x5': libtpu knows no such pod (INVALID_ARGUMENT"),
        (HELD, OURS, "another process holds libtpu (ABORTED"),
        ("", None, "no compiler for v5e:3x5: libtpu is not installed; `pip install libtpu==0.0.52`"),
        ("INTERNAL: anything else", OURS, "anything else. `pip install libtpu==0.0.52`"),
    ],
)
def test_why_there_is_no_compiler(raised: str, libtpu: str | None, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two messages are those of libtpu 0.0.52 and JAX 0.12.0.1."""

    def refuse(*_: object, **__: object) -> object:
        raise RuntimeError(raised)

    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: libtpu)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: libtpu)
    with pytest.raises(ConfigError) as e:
        devices("v5e:3x5")
    assert told in str(e.value)


@pytest.mark.skipif(jax.__version_info__ >= (0, 12), reason="of a JAX before 0.12")
def test_a_libtpu_of_another_jax_is_told_before_it_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.52")
    with pytest.raises(ConfigError, match=r"libtpu 0\.0\.52 is not for JAX 0\.\d+\.\d+; .*0\.0\.42\.1"):
        devices("v5e:2x4")


def test_a_pod_that_cannot_be_is_told_by_libtpu() -> None:
    pytest.importorskip("libtpu", reason="compiles for TPUs: pip install libtpu")
    with pytest.raises(ConfigError, match=r"libtpu knows no such pod .* as v5e:4x4\."):
        devices("v5e:3x5")
    assert len(devices("v5e:2x4")) == 8
