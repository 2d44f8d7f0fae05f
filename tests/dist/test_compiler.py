"""Options of the TPU's compiler: which generation gets which."""

import jax
import pytest

from mmgpt.dist import compiler
from mmgpt.dist.mesh import Mesh


def names(kind: str, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    monkeypatch.setattr(compiler, "platform", lambda: "tpu")
    monkeypatch.setattr(compiler, "device_kind", lambda: kind)
    return set(compiler.options())


def test_each_generation_gets_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    pipelined, offloaded = (
        "xla_tpu_enable_ici_ag_pipelining",
        "xla_tpu_enable_sparse_core_collective_offload_all_gather",
    )
    assert names("TPU v5 lite", monkeypatch) == {"xla_disable_hlo_passes"}
    assert {pipelined, offloaded, "xla_tpu_scoped_vmem_limit_kib"} <= names("TPU v5", monkeypatch)
    assert {pipelined, offloaded} <= names("TPU v6 lite", monkeypatch)
    assert pipelined in names("TPU v4", monkeypatch) and offloaded not in names("TPU v4", monkeypatch)


def test_other_devices_have_none_and_each_option_a_reason() -> None:
    with jax.set_mesh(Mesh.Config().build(jax.devices()[:1])):
        assert compiler.options() == {}
    assert all(len(option.why) > 20 and option.kinds for option in compiler.OPTIONS)
    pairs = [(option.name, kind) for option in compiler.OPTIONS for kind in option.kinds]
    assert len(set(pairs)) == len(pairs)
