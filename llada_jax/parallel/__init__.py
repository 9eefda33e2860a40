"""Meshes and the table from logical axes to mesh axes."""

from llada_jax.parallel.mesh import in_mesh, make_mesh
from llada_jax.parallel.rules import DEFAULT_RULES, MESH_AXES, named_sharding, partition_spec

__all__ = ["DEFAULT_RULES", "MESH_AXES", "in_mesh", "make_mesh", "named_sharding", "partition_spec"]
