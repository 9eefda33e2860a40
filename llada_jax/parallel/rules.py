"""Logical axes of weights and state, and the table that maps them onto the mesh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jax.sharding import Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "expert", "tensor")

# Logical axis -> mesh axis. An axis that is not listed, or that the mesh lacks, is replicated.
DEFAULT_RULES: Mapping[str, str | None] = {
    "batch": "data",
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "experts": "expert",
    "expert_mlp": "tensor",
}


def partition_spec(
    axes: Sequence[str | None],
    shape: Sequence[int],
    mesh: Mesh,
    rules: Mapping[str, str | None] = DEFAULT_RULES,
) -> PartitionSpec:
    """Translates the logical axes of one array to mesh axes.

    Args:
      axes: one logical name (or ``None``) a dimension.
      shape: the array's shape.
      mesh: the device mesh.
      rules: logical axis to mesh axis.

    Returns:
      The partition specification; mesh axes of size 1 count as absent.

    Raises:
      ValueError: if two dimensions map to one mesh axis, or a size does not divide.
    """
    mesh_axes: list[str | None] = []
    for name, size in zip(axes, shape, strict=True):
        axis = rules.get(name) if name is not None else None
        if axis is not None and mesh.shape.get(axis, 1) == 1:
            axis = None
        if axis is not None and axis in mesh_axes:
            raise ValueError(
                f"logical axes {tuple(axes)} map twice to mesh axis {axis!r}; change the rule of "
                f"{name!r}"
            )
        if axis is not None and size % mesh.shape[axis]:
            fits = [n for n in range(1, mesh.shape[axis]) if size % n == 0]
            raise ValueError(
                f"logical axis {name!r} of size {size} does not divide over mesh axis {axis!r} of "
                f"{mesh.shape[axis]} devices; use {fits[-1]} there"
            )
        mesh_axes.append(axis)
    return PartitionSpec(*mesh_axes)


def named_sharding(
    axes: Sequence[str | None],
    shape: Sequence[int],
    mesh: Mesh,
    rules: Mapping[str, str | None] = DEFAULT_RULES,
) -> NamedSharding:
    """``partition_spec`` bound to its mesh; same errors."""
    return NamedSharding(mesh, partition_spec(axes, shape, mesh, rules))
