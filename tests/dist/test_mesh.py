"""The mesh and the rules table: what cannot be is told at start-up, with the names in it."""

import os
import subprocess
import sys

import jax
import pytest

from mmgpt.dist import axes as rules
from mmgpt.dist.axes import ShardingError
from mmgpt.dist.mesh import Mesh


def test_one_size_may_be_left_open() -> None:
    assert dict(Mesh.Config().build().shape) == {"replica": 1, "fsdp": 8, "context": 1, "tensor": 1}
    assert dict(Mesh.Config(fsdp=2, tensor=-1).build().shape) == {"replica": 1, "fsdp": 2, "context": 1, "tensor": 4}
    assert dict(Mesh.Config(tensor=2).build(jax.devices()[:2]).shape)["fsdp"] == 1


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 3}, {"fsdp": -1, "tensor": -1}, {"fsdp": 8, "tensor": 2}, {"replica": 0}, {"tensor": 3}]
)
def test_sizes_that_do_not_fill_the_devices_are_told(sizes: dict[str, int]) -> None:
    with pytest.raises(ShardingError, match=r"multiply to the 8 devices.*--mesh.tensor"):
        Mesh.Config(**sizes).build()


@pytest.mark.parametrize("flags, devices", [("", 3), ("--xla_force_host_platform_device_count=5", 5)])
def test_a_cpu_is_split_unless_the_environment_says_how(flags: str, devices: int) -> None:
    code = "from mmgpt.dist.mesh import Mesh; print(Mesh.Config(cpu_devices=3).build().size)"
    env = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"} | {"XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(devices), done.stderr


def test_logical_axes_become_mesh_axes() -> None:
    with jax.set_mesh(Mesh.Config(fsdp=2, context=2, tensor=2).build()):
        assert rules.stored("embed mlp", (8, 8)) == jax.P("fsdp", "tensor")
        assert rules.stored("mlp embed", (8, 8)) == jax.P(("tensor", "fsdp"), None)
        assert rules.stored("mlp embed", (6, 8)) == jax.P("tensor", "fsdp")  # the first that divides
        assert rules.stored("norm", (3,)) == jax.P(None)
        assert rules.spec("embed mlp", rules.USE) == jax.P(None, "tensor")
        assert rules.spec("batch seq embed", rules.ACT) == jax.P("fsdp", "context", None)
    with jax.set_mesh(Mesh.Config(replica=2, fsdp=4).build()):
        assert rules.spec("batch seq embed", rules.ACT) == jax.P(("replica", "fsdp"), None, None)


def test_what_cannot_be_laid_out_is_told() -> None:
    with pytest.raises(ShardingError, match="no mesh is set"):
        rules.spec("embed", rules.USE)
    with jax.set_mesh(Mesh.Config(fsdp=4, tensor=2).build()):
        with pytest.raises(ShardingError, match="unknown logical axis 'embd'; known are embed, mlp"):
            rules.spec("embd mlp", rules.USE)
        with pytest.raises(ShardingError, match="tensor is used by two dimensions"):
            rules.spec("mlp heads", rules.USE)
        with pytest.raises(
            ShardingError,
            match=r"gate .*shape \(6, 4\).*no dimension of embed, mlp divides over fsdp=4; change the size",
        ):
            rules.stored("embed mlp", (6, 4), "gate")
        with pytest.raises(ShardingError, match=r"down .*'mlp' of 3 does not divide over 2 devices \(tensor\)"):
            rules.stored("mlp embed", (3, 4), "down")
        with pytest.raises(ShardingError, match="2 axis names for 1 dimensions"):
            rules.spec("embed mlp", rules.USE, (8,))
