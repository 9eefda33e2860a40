"""Attention of block-diffusion training: checks, padding to tiles, dispatch, ``shard_map``."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.block_diffusion_attention.kernel import Tiles, splash_attention
from pallas_kernels.block_diffusion_attention.mask import BlockDiffusionMask
from pallas_kernels.block_diffusion_attention.tuning import tiles_for, xla_tile
from pallas_kernels.block_diffusion_attention.xla import xla_attention

ROW_AXES = ("data", "fsdp", "expert")  # over which rows are spread
HEAD_AXIS = "tensor"


def block_diffusion_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    mask: BlockDiffusionMask,
    *,
    implementation: dispatch.Implementation | None = None,
    tiles: Tiles | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention under a block-diffusion mask; neither mask nor scores are ever whole.

    Scores are scaled by ``H ** -0.5``; softmax and sums are float32. Has a gradient in query, key
    and value. Where a mesh is in force (``jax.set_mesh``), rows are spread over its data, fsdp and
    expert axes and heads over tensor, as far as these divide them.

    Args:
      query: T tokens, in segments as the mask's layout says; N / K query heads share a key head.
      key, value: S tokens, likewise.
      mask: who sees whom.
      implementation: ``"pallas"`` (splash attention), ``"xla"``, or ``None``: the kernel on TPUs.
      tiles: of the kernel; from the table by default.

    Returns:
      The mixed values in ``query``'s type. Padding rows hold something finite.

    Raises:
      ValueError: if shapes do not fit the mask or each other, or for an unknown implementation.
    """
    _check(query, key, value, mask)
    geometry = mask.geometry
    chosen = tiles_for(geometry) if tiles is None else tiles

    def padded(f: Any, multiple: int, size: Any):
        def run(q: Array, k: Array, v: Array, mask: BlockDiffusionMask) -> Array:
            length = geometry.length
            whole = -(-length // multiple) * multiple
            filled = (
                _fill(q, 1, length, whole),
                _fill(k, 2, length, whole),
                _fill(v, 2, length, whole),
            )
            return _cut(f(*filled, mask.padded(whole), size), 1, length, whole)

        return run

    tile = xla_tile(geometry)
    pallas, xla = (
        padded(splash_attention, chosen.largest, chosen),
        padded(xla_attention, tile, tile),
    )

    def local(*operands: Any) -> Array:
        return dispatch.run(implementation, pallas, xla, *operands)

    mesh, axes = dispatch.mesh_axes(*ROW_AXES, HEAD_AXIS)
    if mesh is not None and axes:
        local = _spread(local, mesh, axes, query.shape[0], key.shape[1])
    with jax.named_scope("block_diffusion_attention"):
        return local(query, key, value, mask)


def _check(query: Array, key: Array, value: Array, mask: BlockDiffusionMask) -> None:
    geometry = mask.geometry
    length = geometry.length
    wanted = len(geometry.queries) * length, len(geometry.keys) * length
    if (query.shape[1], key.shape[2]) != wanted:
        raise ValueError(
            f"{query.shape[1]} queries and {key.shape[2]} keys, but a mask of layout "
            f"{geometry.layout!r} over rows of {length} has {wanted[0]} and {wanted[1]}"
        )
    if key.shape != value.shape or query.shape[2] % key.shape[1]:
        raise ValueError(
            f"keys {key.shape}, values {value.shape} and {query.shape[2]} query heads do not fit: "
            "keys and values need one shape, and a number of heads that divides the queries'"
        )
    if query.shape[0] != mask.document.shape[0]:
        raise ValueError(
            f"{query.shape[0]} rows of queries, but a mask of {mask.document.shape[0]} rows"
        )


def _spread(local: Any, mesh: Any, axes: tuple[str, ...], rows: int, kv_heads: int) -> Any:
    """Within ``shard_map``: Mosaic kernels cannot be partitioned automatically."""
    over: list[str] = []
    for axis in axes:
        count = mesh.shape[axis]
        if axis != HEAD_AXIS and rows % count == 0:
            over.append(axis)
            rows //= count
    head = HEAD_AXIS if HEAD_AXIS in axes and kv_heads % mesh.shape[HEAD_AXIS] == 0 else None
    row = tuple(over) or None
    spec_q, spec_k = PartitionSpec(row, None, head), PartitionSpec(row, head)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(spec_q, spec_k, spec_k, PartitionSpec(row)),
        out_specs=spec_q,
        check_vma=False,  # Mosaic kernels do not say how their outputs vary
    )


def _fill(x: Array, axis: int, length: int, whole: int) -> Array:
    """Each segment of ``length`` places along ``axis`` gets zeros up to ``whole`` places."""
    if whole == length:
        return x
    cut = x.reshape(*x.shape[:axis], -1, length, *x.shape[axis + 1 :])
    widths = [(0, whole - length if i == axis + 1 else 0) for i in range(cut.ndim)]
    return jnp.pad(cut, widths).reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])


def _cut(x: Array, axis: int, length: int, whole: int) -> Array:
    """Undoes ``_fill``."""
    if whole == length:
        return x
    cut = x.reshape(*x.shape[:axis], -1, whole, *x.shape[axis + 1 :])
    cut = jax.lax.slice_in_dim(cut, 0, length, axis=axis + 1)
    return cut.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])
