"""Which implementation of an operation runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
from jax.sharding import AbstractMesh

Implementation = Literal["pallas", "xla"]


def check_implementation(name: str | None) -> None:
    """Raises if this names no implementation.

    Raises:
      ValueError: naming those there are.
    """
    if name is not None and name not in get_args(Implementation):
        names = ", ".join(get_args(Implementation))
        raise ValueError(f"kernels or implementation = {name!r} is none of {names}, None")


def run(
    implementation: Implementation | None,
    pallas: Callable[..., Any],
    xla: Callable[..., Any],
    *operands: Any,
) -> Any:
    """Runs one of two implementations of an operation on ``operands`` (pytrees of arrays).

    Args:
      implementation: ``"pallas"``: the kernel, on any platform (elsewhere than on a TPU it fails
        unless jax interprets it: ``pltpu.force_tpu_interpret_mode``). ``"xla"``: plain XLA.
        ``None``: the kernel where the program is compiled for a TPU, else XLA.
      pallas, xla: take ``operands``.

    Raises:
      ValueError: for another name.
    """
    check_implementation(implementation)
    if implementation is None:
        return jax.lax.platform_dependent(*operands, tpu=pallas, default=xla)
    return (pallas if implementation == "pallas" else xla)(*operands)


def mesh_axes(*names: str) -> tuple[AbstractMesh | None, tuple[str, ...]]:
    """The mesh in force (``jax.set_mesh``), and those of ``names`` that it spreads over devices.

    Returns:
      ``(mesh, axes)``; the mesh is ``None`` if there is none, or within ``shard_map``, where
      everything is local already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_manual:
        return None, ()
    return mesh, tuple(n for n in names if mesh.shape.get(n, 1) > 1)
