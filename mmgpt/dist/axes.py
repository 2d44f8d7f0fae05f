"""The rules table: which mesh axes each logical axis lies on, in a matmul and in activations, and weights at rest.

Models name logical axes where an array is made ("batch seq embed"); everything about sharding is in this file.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from mmgpt.core.errors import UserError

MESH_AXES = ("replica", "fsdp", "context", "tensor")

Table = dict[str, tuple[str, ...]]

USE: Table = {
    "embed": (),
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
    "time": (),
    "channels": (),
    "norm": (),
}
"""Weights inside a matmul."""

SPREAD = ("vocab", "embed", "mlp", "heads", "kv_heads")
"""Axes that `fsdp` may divide in a matrix at rest, beside what USE says: it takes the first of them that divides.

The first is never the minor one, so that a device's part stays whole tiles of it: below 128 columns a TPU's compiler
makes an all-reduce of the whole weight where it should gather.
"""

ACT: Table = {
    "batch": ("replica", "fsdp"),
    "seq": ("context",),
    "keys": (),
    "embed": (),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "layers": (),
    "head_dim": (),
    "vocab": ("tensor",),
    "codes": (),
    "pixels": (),
    "norm": (),
    "height": (),
    "width": (),
    "time": (),
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


def stored(axes: str, shape: tuple[int, ...], what: str = "parameter") -> PartitionSpec:
    """The partition of a weight and its moments at rest; from there to `spec(axes, USE)` is the FSDP gather.

    ShardingError as of `spec`, also where `fsdp` divides no dimension of a matrix.
    """
    names = axes.split()
    used = list(spec(axes, USE, shape, what))
    sizes = jax.sharding.get_abstract_mesh().shape
    open_to = [i for i, name in enumerate(names) if name in SPREAD]
    if sizes["fsdp"] == 1 or len(open_to) < 2:  # a gain is not worth gathering
        return PartitionSpec(*used)
    for i in open_to:
        here = (used[i],) if isinstance(used[i], str) else used[i] or ()
        if shape[i] % (sizes["fsdp"] * math.prod(sizes[a] for a in here)) == 0:
            used[i] = (*here, "fsdp") if here else "fsdp"
            return PartitionSpec(*used)
    raise ShardingError(
        f"{what} (axes {axes!r}, shape {shape}, mesh {dict(sizes)}): no dimension of "
        f"{', '.join(names[i] for i in open_to)} divides over fsdp={sizes['fsdp']}; change the size or the mesh."
    )


def divided(spec: PartitionSpec, axis: str) -> int | None:
    """Which dimension of an array a mesh axis divides; None where it divides none."""
    return next((i for i, axes in enumerate(spec) if axis in jax.tree.leaves(axes)), None)


def ways(axis: str, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> int:
    """Into how many parts a mesh divides an activation's logical axis."""
    return math.prod(mesh.shape[a] for a in ACT[axis])


def share(axis: str, mesh: jax.sharding.Mesh) -> tuple[int, int]:
    """Which of how many equal parts of an activation's logical axis lies on this process's devices: `(part, parts)`.

    Raises ShardingError where the devices of a process hold no such part.
    """
    count = ways(axis, mesh)
    indices = NamedSharding(mesh, PartitionSpec(ACT[axis])).devices_indices_map((count,))
    held: dict[int, set[int]] = {}
    for device, (rows,) in indices.items():
        held.setdefault(device.process_index, set()).add(rows.start or 0)
    mine = sorted(held[jax.process_index()])
    size = len(mine)
    if any(sorted(rows) != [min(rows) // size * size + i for i in range(size)] for rows in held.values()):
        raise ShardingError(
            f"mesh {dict(mesh.shape)}: the devices of one process must hold equal, adjoining parts of {axis!r}; make "
            f"{' x '.join(ACT[axis])} a multiple of the number of processes, or a divisor of it."
        )
    return mine[0] // size, count // size


def by_layer(function: Callable[..., Any], *trees: Any) -> Any:
    """`function(*trees)` on whole layers of stacked arrays `[layers, ...]`, a part of the layers on each device.

    The result is a pair of trees like the first two of `trees`. Where the layers do not divide over the devices, the
    compiler chooses. Arrays of fewer than three dimensions are given to all whole.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    axes = tuple(a for a in MESH_AXES if sizes[a] > 1)
    layers = {leaf.shape[0] for leaf in jax.tree.leaves(trees[0])}
    if any(layer % math.prod(sizes[a] for a in axes) for layer in layers):
        axes = tuple(a for a in axes if a != "replica")  # what replicas do twice costs no memory
    if any(layer % math.prod(sizes[a] for a in axes) for layer in layers):
        return function(*trees)
    whole, split = PartitionSpec(), PartitionSpec(axes)
    specs = jax.tree.map(lambda leaf: split if leaf.ndim > 2 else whole, trees)
    return jax.shard_map(function, in_specs=specs, out_specs=specs[:2])(*trees)


def sharding(axes: str, table: Table, shape: tuple[int, ...] | None = None, what: str = "array") -> NamedSharding:
    """`spec` as a sharding on the current concrete mesh."""
    return NamedSharding(jax.sharding.get_mesh(), spec(axes, table, shape, what))
