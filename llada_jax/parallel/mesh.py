"""Device meshes with the project's axis names."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from llada_jax.parallel.rules import MESH_AXES


def make_mesh(
    *,
    data: int = 1,
    fsdp: int = 1,
    expert: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Builds a mesh with axes ``("data", "fsdp", "expert", "tensor")``.

    Axis types are ``Auto``: XLA places the intermediate values, weights follow the rules table.

    Args:
      data, fsdp, expert, tensor: devices along each axis.
      devices: the devices to use; all of them by default.

    Raises:
      ValueError: if the axes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = (data, fsdp, expert, tensor)
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"a mesh of {' x '.join(map(str, sizes))} needs {math.prod(sizes)} devices; "
            f"there are {len(devices)}"
        )
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 4, devices=devices)


def in_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """While tracing: kernels divide their work over ``mesh``; nothing changes for ``None``.

    XLA partitions everything else by itself, but a kernel has to be told.
    """
    if mesh is None:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
