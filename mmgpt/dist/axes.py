"""The rules table: which mesh axes each logical axis lies on, at rest, in a matmul, and in activations.

Models name logical axes where an array is made ("batch seq embed"); everything about sharding is in this file.
"""

import math

import jax
from jax.sharding import NamedSharding, PartitionSpec

from mmgpt.core.errors import UserError

MESH_AXES = ("replica", "fsdp", "context", "tensor")

Table = dict[str, tuple[str, ...]]

STORE: Table = {
    "embed": ("fsdp",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "vocab": ("tensor",),
    "head_dim": (),
    "layers": (),
    "codes": (),
    "pixels": (),
    "height": (),
    "width": (),
    "norm": (),
}
"""Weights and optimizer moments at rest."""

USE: Table = {**STORE, "embed": ()}
"""Weights inside a matmul: the step from STORE to USE is the FSDP gather."""

ACT: Table = {
    "batch": ("replica", "fsdp"),
    "seq": ("context",),
    "keys": (),
    "embed": (),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "vocab": ("tensor",),
    "codes": (),
    "pixels": (),
    "norm": (),
    "height": (),
    "width": (),
    "channels": (),
}
"""Activations."""


class ShardingError(UserError, ValueError):
    """A layout that cannot be: unknown axis, an axis used twice, or a dimension that does not divide."""


def spec(axes: str, table: Table, shape: tuple[int, ...] | None = None, what: str = "array") -> PartitionSpec:
    """The partition of an array whose dimensions carry the logical names in `axes` (separated by spaces).

    With `shape`, checks that every dimension divides over the current mesh. Raises ShardingError with the array's
    name, shape, axes and mesh.
    """
    names = axes.split()
    mesh = jax.sharding.get_abstract_mesh()
    sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
    where = f"{what} (axes {axes!r}, shape {shape}, mesh {sizes})"
    if not sizes:
        raise ShardingError(f"{where}: no mesh is set; run inside `with jax.set_mesh(Mesh.Config().build()):`.")
    if shape is not None and len(shape) != len(names):
        raise ShardingError(f"{where}: {len(names)} axis names for {len(shape)} dimensions.")
    entries: list[tuple[str, ...] | str | None] = []
    used: set[str] = set()
    for dim, name in enumerate(names):
        if name not in table:
            raise ShardingError(f"{where}: unknown logical axis {name!r}; known are {', '.join(table)}.")
        mesh_axes = tuple(a for a in table[name] if sizes[a] > 1)
        twice = used.intersection(mesh_axes)
        if twice:
            raise ShardingError(f"{where}: mesh axis {', '.join(twice)} is used by two dimensions.")
        used.update(mesh_axes)
        ways = 1
        for a in mesh_axes:
            ways *= sizes[a]
        if shape is not None and shape[dim] % ways:
            raise ShardingError(
                f"{where}: dimension {name!r} of {shape[dim]} does not divide over {ways} devices "
                f"({' x '.join(mesh_axes)}); change the size or the mesh."
            )
        entries.append(mesh_axes if len(mesh_axes) > 1 else mesh_axes[0] if mesh_axes else None)
    return PartitionSpec(*entries)


def ways(axis: str, mesh: jax.sharding.Mesh) -> int:
    """Into how many parts a mesh divides an activation's logical axis."""
    return math.prod(mesh.shape[a] for a in ACT[axis])


def sharding(axes: str, table: Table, shape: tuple[int, ...] | None = None, what: str = "array") -> NamedSharding:
    """`spec` as a sharding on the current concrete mesh."""
    return NamedSharding(jax.sharding.get_mesh(), spec(axes, table, shape, what))
