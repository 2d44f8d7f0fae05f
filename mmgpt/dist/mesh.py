"""The one mesh of a run: Explicit axes `replica, fsdp, context, tensor`."""

import jax
from jax.sharding import AxisType

from mmgpt.core.config import Config
from mmgpt.dist.axes import MESH_AXES, ShardingError


class Mesh:
    class Config(Config):
        """Devices along each mesh axis; one of them may be -1, which takes what is left."""

        replica: int = 1
        fsdp: int = -1
        context: int = 1
        tensor: int = 1

        def build(self) -> jax.sharding.Mesh:
            """The mesh over all devices; ShardingError when the sizes do not multiply to the device count."""
            sizes = [self.replica, self.fsdp, self.context, self.tensor]
            devices = jax.device_count()
            known = 1
            for size in sizes:
                known *= size if size > 0 else 1
            wild = [i for i, size in enumerate(sizes) if size == -1]
            if len(wild) == 1 and devices % known == 0:
                sizes[wild[0]] = devices // known
                known = devices
            if known != devices or any(size < 1 for size in sizes):
                raise ShardingError(
                    f"mesh {dict(zip(MESH_AXES, sizes, strict=True))}: the sizes must multiply to the {devices} devices "
                    "that are there; set --mesh.replica, --mesh.fsdp, --mesh.context, --mesh.tensor (one may be -1)."
                )
            return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))
