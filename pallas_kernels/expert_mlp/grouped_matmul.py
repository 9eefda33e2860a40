"""Rows sorted by group times one matrix a group.

``jax.lax.ragged_dot`` does this well on TPU and GPU. On XLA:CPU it multiplies every row with every
group's matrix, so there a loop over tiles of rows takes its place: a tile belongs to one group,
and only tiles that exist are visited. Quantised matrices are read in the layered form.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.quantized import Matrix, QuantizedMatrix, dequantize


def grouped_matmul(
    rows: Float[Array, "M D"],
    matrices: Matrix,
    group_sizes: Int[Array, " E"],
    layer: Int[Array, ""] | None = None,
) -> Float[Array, "M F"]:
    """Multiplies each run of rows with its group's matrix.

    Args:
      rows: the first ``group_sizes[0]`` rows belong to group 0, and so on; rows beyond the sum of
        the sizes belong to none.
      matrices: one matrix a group ``[E, D, F]``; with ``layer``, those of all layers
        ``[L, E, D, F]``, of which one layer's are read in place (no copy on CPU). Cast to
        ``rows.dtype``. Quantised ones are dequantised, with ``layer`` only what is needed (on CPU).
      group_sizes: rows a group.
      layer: which layer's matrices to use. This form has no gradient.

    Returns:
      The products; rows that belong to no group are zero.
    """
    if layer is not None:
        return _forward_stacked(rows, matrices, group_sizes, layer)
    return _grouped_matmul(rows, _dense(matrices, rows.dtype), group_sizes)


def _dense(matrices: Matrix, dtype: Any) -> Array:
    if isinstance(matrices, QuantizedMatrix):
        return dequantize(matrices, dtype)
    return matrices.astype(dtype)


def _precision_of(dtype: Any) -> jax.lax.Precision | None:
    """Full float32 products for float32; TPUs and tensor cores round otherwise."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _forward_stacked(rows: Array, matrices: Matrix, sizes: Array, layer: Array) -> Array:
    def in_tiles(rows, matrices, sizes, layer):
        return _tile_loop(rows, matrices, sizes, layer)

    def ragged(rows, matrices, sizes, layer):
        one = jax.tree.map(
            lambda a: jax.lax.dynamic_index_in_dim(a, layer, keepdims=False), matrices
        )
        if not isinstance(one, QuantizedMatrix) or one.scheme != "int8":
            return _ragged_dot(rows, _dense(one, rows.dtype), sizes)
        # One scale a column comes after the product: no float32 copy of the matrices.
        product = _ragged_dot(rows, one.values.astype(rows.dtype), sizes)
        ends = jnp.cumsum(sizes)
        group = jnp.searchsorted(ends, jnp.arange(len(rows)), side="right")
        scales = one.scales[jnp.minimum(group, len(sizes) - 1), 0]
        return (product.astype(jnp.float32) * scales).astype(rows.dtype)

    return jax.lax.platform_dependent(rows, matrices, sizes, layer, cpu=in_tiles, default=ragged)


@jax.custom_vjp
def _grouped_matmul(rows: Array, matrices: Array, sizes: Array) -> Array:
    return jax.lax.platform_dependent(
        rows,
        matrices,
        sizes,
        cpu=lambda r, m, s: _tile_loop(r, m[None], s, jnp.int32(0)),
        default=_ragged_dot,
    )


def _forward(rows, matrices, sizes):
    return _grouped_matmul(rows, matrices, sizes), (rows, matrices, sizes)


def _backward(residuals, cotangent):
    rows, matrices, sizes = residuals

    def in_tiles(rows, matrices, sizes, cotangent):
        transposed = matrices.swapaxes(1, 2)[None]
        return (
            _tile_loop(cotangent, transposed, sizes, jnp.int32(0)),
            _tile_outer(rows, cotangent, sizes),
        )

    def ragged(rows, matrices, sizes, cotangent):
        return jax.vjp(lambda r, m: _ragged_dot(r, m, sizes), rows, matrices)[1](cotangent)

    return (
        *jax.lax.platform_dependent(rows, matrices, sizes, cotangent, cpu=in_tiles, default=ragged),
        None,
    )


_grouped_matmul.defvjp(_forward, _backward)


def _ragged_dot(rows: Array, matrices: Array, sizes: Array) -> Array:
    product = jax.lax.ragged_dot(rows, matrices, sizes, precision=_precision_of(rows.dtype))
    # What the rows beyond the last group hold is up to the platform.
    return jnp.where(jnp.arange(len(rows))[:, None] < sizes.sum(), product, 0)


def _tile_rows(rows: int, groups: int) -> int:
    """Tile height: about one mean group, between 8 and 128 rows."""
    mean = max(1, rows // groups)
    return min(128, max(8, 1 << (mean - 1).bit_length()))


def _tiles(sizes: Array, rows: int, height: int) -> tuple[Array, Array, Array]:
    """Lays tiles over the groups, in order.

    Returns:
      ``(count, group, start)``: tiles in use, and for each of at most ``M / height + E`` tiles its
      group and first row.
    """
    ends = jnp.cumsum(sizes)
    last_tile = jnp.cumsum((sizes + height - 1) // height)  # tiles up to and including a group
    tile = jnp.arange(rows // height + len(sizes))
    group = jnp.minimum(jnp.searchsorted(last_tile, tile, side="right"), len(sizes) - 1)
    tiles_before = jnp.where(group > 0, last_tile[group - 1], 0)
    start = ends[group] - sizes[group] + (tile - tiles_before) * height
    return last_tile[-1], group, start


def _tile_loop(rows: Array, matrices: Matrix, sizes: Array, layer: Array) -> Array:
    """``matrices [L, E, D, F]``. A tile may run past its group; the next group overwrites that."""
    height = _tile_rows(len(rows), len(sizes))
    count, group, start = _tiles(sizes, len(rows), height)
    inner, outer = matrices.shape[2:]
    padded = jnp.pad(rows, ((0, height), (0, 0)))

    def body(i, out):
        tile = jax.lax.dynamic_slice(padded, (start[i], 0), (height, inner))
        matrix = jax.tree.map(
            lambda a: jax.lax.dynamic_slice(a, (layer, group[i], 0, 0), (1, 1, *a.shape[2:]))[0, 0],
            matrices,
        )
        product = jnp.dot(
            tile,
            _dense(matrix, tile.dtype),
            precision=_precision_of(tile.dtype),
        )
        return jax.lax.dynamic_update_slice(out, product, (start[i], 0))

    out = jnp.zeros((len(padded), outer), rows.dtype)
    out = jax.lax.fori_loop(0, count, body, out)[: len(rows)]
    return jnp.where(jnp.arange(len(rows))[:, None] < sizes.sum(), out, 0)


def _tile_outer(rows: Array, cotangent: Array, sizes: Array) -> Array:
    """The gradient of the matrices: for each group, ``rows^T @ cotangent`` over its rows."""
    height = _tile_rows(len(rows), len(sizes))
    count, group, start = _tiles(sizes, len(rows), height)
    ends = jnp.cumsum(sizes)
    inner, outer = rows.shape[1], cotangent.shape[1]
    padded = jnp.pad(rows, ((0, height), (0, 0)))
    padded_cotangent = jnp.pad(cotangent, ((0, height), (0, 0)))

    def body(i, out):
        tile = jax.lax.dynamic_slice(padded, (start[i], 0), (height, inner))
        of_tile = jax.lax.dynamic_slice(padded_cotangent, (start[i], 0), (height, outer))
        inside = start[i] + jnp.arange(height) < ends[group[i]]
        tile, of_tile = (jnp.where(inside[:, None], a, 0) for a in (tile, of_tile))
        product = jnp.dot(
            tile.T,
            of_tile,
            precision=_precision_of(tile.dtype),
            preferred_element_type=jnp.float32,
        )
        old = jax.lax.dynamic_slice(out, (group[i], 0, 0), (1, inner, outer))
        return jax.lax.dynamic_update_slice(out, old + product[None], (group[i], 0, 0))

    out = jnp.zeros((len(sizes), inner, outer), jnp.float32)  # tiles add up in float32
    return jax.lax.fori_loop(0, count, body, out).astype(rows.dtype)
