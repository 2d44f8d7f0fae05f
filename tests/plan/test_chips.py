"""Why there is no compiler for a pod: libtpu is missing, is held, knows no such pod, or is of another JAX."""

import importlib.util

import pytest
from jax.experimental import topologies

from mmgpt.core.config import ConfigError
from mmgpt.plan.chips import devices

NOT_DIVISIBLE = (
    'INVALID_ARGUMENT: Topology layout "v5e:3x5" is not divisible by the given (or default) chips_per_host_bounds '
    '"2x2x1"'
)
HELD = "ABORTED: Internal error when accessing libtpu multi-process lockfile."
MISSING = "JAX TPU support not installed; cannot generate TPU topology. See https://github.com/jax-ml/jax#installation"


@pytest.mark.parametrize(
    ("raised", "there", "told"),
    [
        (NOT_DIVISIBLE, True, "'v5e:3x5': libtpu knows no such pod (INVALID_ARGUMENT"),
        (HELD, True, "another process holds libtpu (ABORTED"),
        (MISSING, False, "no compiler for v5e:3x5: libtpu is not installed; `pip install libtpu`."),
        ("INTERNAL: anything else", True, "anything else. `pip install -U libtpu` brings"),
    ],
)
def test_why_there_is_no_compiler(raised: str, there: bool, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first three messages are those of libtpu 0.0.52 and JAX 0.12.0.1."""

    def refuse(*_: object, **__: object) -> object:
        raise RuntimeError(raised)

    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if there else None)
    with pytest.raises(ConfigError) as e:
        devices("v5e:3x5")
    assert told in str(e.value) and ("pip install libtpu" in str(e.value)) == (not there)


def test_a_pod_that_cannot_be_is_told_by_libtpu() -> None:
    pytest.importorskip("libtpu", reason="compiles for TPUs: pip install libtpu")
    with pytest.raises(ConfigError, match=r"libtpu knows no such pod .* as v5e:4x4\."):
        devices("v5e:3x5")
    assert len(devices("v5e:2x4")) == 8
