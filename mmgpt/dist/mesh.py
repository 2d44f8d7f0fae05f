"""The one mesh of a run: Explicit axes `replica, fsdp, context, tensor`."""

import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType

from mmgpt.core.config import Config
from mmgpt.dist.axes import MESH_AXES, ShardingError
from mmgpt.dist.hosts import devices_in_use


class Mesh:
    class Config(Config):
        """Devices along each mesh axis; one of them may be -1, which takes what is left.

        `cpu_devices` splits a CPU: where matmuls are too small for all cores, a device for every core or two keeps
        more of them busy. It does nothing once JAX has touched a device, or where the environment already says it.
        """

        replica: int = 1
        fsdp: int = -1
        context: int = 1
        tensor: int = 1
        cpu_devices: int = 1

        def split_cpu(self) -> None:
            """Makes the CPU devices; to be called before JAX touches one."""
            said = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
            if self.cpu_devices > 1 and jax.config.values["jax_num_cpu_devices"] < 0 and not (said or devices_in_use()):
                jax.config.update("jax_num_cpu_devices", self.cpu_devices)

        def build(self, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
            """The mesh over `devices`, by default all; ShardingError when the sizes do not multiply to their number.

            Slices of a multislice pod lie along `replica`.
            """
            self.split_cpu()
            sizes = self.sizes(jax.device_count() if devices is None else len(devices))
            explicit = (AxisType.Explicit,) * len(MESH_AXES)
            found = jax.devices() if devices is None else list(devices)
            slices = len({getattr(device, "slice_index", 0) for device in found})
            if slices == 1:
                try:
                    return jax.make_mesh(sizes, MESH_AXES, axis_types=explicit, devices=found)
                except NotImplementedError:  # an axis takes a part of a dimension of the torus
                    grid = mesh_utils.create_device_mesh(sizes, found, allow_split_physical_axes=True)
                    return jax.sharding.Mesh(grid, MESH_AXES, axis_types=explicit)
            if sizes[0] % slices:
                raise ShardingError(
                    f"mesh {dict(zip(MESH_AXES, sizes, strict=True))}: the {slices} slices are replicas of one "
                    f"another, since the network between them is slow; set --mesh.replica to a multiple of {slices}."
                )
            within = (sizes[0] // slices, *sizes[1:])
            grid = mesh_utils.create_hybrid_device_mesh(
                within, (slices, 1, 1, 1), found, allow_split_physical_axes=True
            )
            return jax.sharding.Mesh(grid, MESH_AXES, axis_types=explicit)

        def sizes(self, count: int) -> tuple[int, ...]:
            """The axes of a mesh of `count` devices; ShardingError when the sizes do not multiply to that."""
            sizes = [self.replica, self.fsdp, self.context, self.tensor]
            known = 1
            for size in sizes:
                known *= size if size > 0 else 1
            wild = [i for i, size in enumerate(sizes) if size == -1]
            if len(wild) == 1 and count % known == 0:
                sizes[wild[0]] = count // known
                known = count
            if known != count or any(size < 1 for size in sizes):
                raise ShardingError(
                    f"mesh {dict(zip(MESH_AXES, sizes, strict=True))}: the sizes must multiply to the {count} devices "
                    "of the run; set --mesh.replica, --mesh.fsdp, --mesh.context, --mesh.tensor (one may be -1)."
                )
            return tuple(sizes)


def device_kind() -> str:
    """The kind of the current mesh's devices ("TPU v5", "TPU v6 lite", "NVIDIA H100 ..."), where they are known."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def platform() -> str:
    """What the current mesh's devices are ("cpu", "gpu", "tpu"), also in a program for devices that are not here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name == "cuda" else name  # JAX has both names for one thing
