"""Inside the kernel: the product of a tile of rows with a weight block, dequantised on the way."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.quantized import BLOCK, GROUP, Matrix, QuantizedMatrix

# bfloat16 has 7 bits after the leading one: 0x4300 | n is 128 + n for n < 128.
FP8_SHIFT = 60  # rows are multiplied by 2**60, so that products with 2**-120 do not vanish
_FP8_UNDO = 60
_MAGIC, _OFFSET = 0x43004300, 136  # a nibble has 8 added to it


def values_and_scales(matrix: Any) -> tuple[Any, ...]:
    """The arrays of a matrix: one, or values and scales."""
    if isinstance(matrix, QuantizedMatrix):
        return matrix.values, matrix.scales
    return (matrix,)


def flat_scales(matrix: Matrix, layer: Array) -> Matrix:
    """fp8 only: one layer's block scales as ``[1, E, 1, I/128 * O/128]``; they are few.

    A row of scalars has no padding in memory, where a small matrix would be padded to tiles.
    """
    if not isinstance(matrix, QuantizedMatrix) or matrix.scheme != "fp8":
        return matrix
    scales = jax.lax.dynamic_index_in_dim(matrix.scales, layer, keepdims=True)
    return dataclasses.replace(matrix, scales=scales.reshape(1, scales.shape[1], 1, -1))


def is_shuffled(scheme: str | None, rows: int, dtype: Any) -> bool:
    """Whether weights of ``rows`` rows come out of a group with even rows first, then odd ones."""
    return scheme == "int4" or (scheme == "fp8" and dtype == jnp.bfloat16 and rows % GROUP == 0)


def group_order() -> np.ndarray:
    """Rows of a group in the order in which unpacking brings them out."""
    return np.concatenate([np.arange(0, GROUP, 2), np.arange(1, GROUP, 2)])


def row_sums(rows: Any, sums: Any, scheme: str | None) -> None:
    """For int4, whose values carry an offset: ``sums[g] [R, 128]``, sums of ``rows`` a group."""
    if scheme != "int4" or rows.dtype == jnp.float32:
        return
    for g in range(rows.shape[1] // GROUP):
        group = rows[:, g * GROUP : (g + 1) * GROUP].astype(jnp.float32)
        sums[g] = jnp.broadcast_to(group.sum(1, keepdims=True), sums.shape[1:]) * _OFFSET


def product(
    rows: Any,
    sums: Any,
    weight: Any,
    scheme: str | None,
    at: Any,
    size: int,
    dtype: Any,
    width: int,
    first_column: Any = 0,
    first_row: Any = 0,
) -> Array:
    """``rows @ weight[:, at : at + size]`` in float32.

    Args:
      rows: ref [R, I] (zeros in columns beyond the weight's rows).
      sums: see ``row_sums``.
      weight: refs [1, 1, I, O], and scales.
      scheme: how they are quantised.
      at, size: which columns.
      dtype: of the product's operands.
      width: columns of the whole matrix.
      first_column, first_row: where in the whole matrix the block begins.
    """
    values, columns = weight[0], pl.ds(at, size)
    held = 2 if scheme == "int4" else 1  # rows a byte
    shuffled = is_shuffled(scheme, values.shape[2], dtype)
    across = pl.cdiv(width, BLOCK)

    def group(g, deep):
        """Rows from ``g * GROUP`` on, ``deep`` of them: one group if they have their own scale."""
        first, stored = g * GROUP, g * (GROUP // held)
        if not isinstance(g, int):
            first, stored = pl.multiple_of(first, GROUP), pl.multiple_of(stored, GROUP // held)
        left = rows[:, pl.ds(first, deep)]
        block = values[0, 0, pl.ds(stored, deep // held), columns]
        if scheme is None or scheme == "int8":
            return _dot(left, block.astype(dtype))
        if scheme == "fp8":
            block = _fp8_bits(block) if shuffled else block.astype(dtype)
            place = ((first_row >> 7) + g) * across + ((first_column + at) >> 7)
            return _dot(left, block) * _spread(weight[1][0, 0], place, size)
        block = _unpack_int4(block)
        if dtype == jnp.float32:
            part = _dot(left, block.astype(jnp.float32) - _OFFSET)
        else:
            part = _dot(left, block) - _repeat(sums[g], size)
        return part * weight[1][0, 0, pl.ds(g, 1), columns]

    contracted = values.shape[2] * held
    # Rows of the weight in one trip of the loop: more would not fit in registers.
    trip = 1024 if rows.shape[0] < 64 else 512
    piece = min(contracted, GROUP if scheme in ("fp8", "int4") else trip)

    def several(first, count):
        return sum(group(first + j * (piece // GROUP), piece) for j in range(count))

    whole = contracted // trip
    total = jnp.zeros((rows.shape[0], size), jnp.float32)
    # Not unrolled as a whole: the scheduler would run out of registers.
    if whole > 1:
        total = jax.lax.fori_loop(
            0, whole, lambda i, t: t + several(i * (trip // GROUP), trip // piece), total
        )
    done = whole * trip if whole > 1 else 0
    while done < contracted:
        deep = min(piece, contracted - done)
        total += group(done // GROUP, deep)
        done += deep
    if scheme == "int8":
        return total * weight[1][0, 0, :, columns]
    return total * 2.0**_FP8_UNDO if shuffled and scheme == "fp8" else total


def _repeat(column: Array, size: int) -> Array:
    """``[R, 128]``, equal along the lanes, to ``[R, size]``."""
    return jnp.concatenate([column] * -(-size // 128), axis=1)[:, :size]


def _spread(scales: Array, block: Any, size: int) -> Array:
    """Scales ``[1, n]`` from ``block`` on, each repeated over its columns: ``[1, size]``."""
    lane = jax.lax.broadcasted_iota(jnp.int32, scales.shape, 1)
    parts = []
    for j in range(pl.cdiv(size, BLOCK)):
        one = jnp.where(lane == block + j, scales, 0.0).sum(1, keepdims=True)
        parts.append(jnp.broadcast_to(one, (1, min(BLOCK, size - j * BLOCK))))
    return jnp.concatenate(parts, axis=1)


def _unpack_int4(packed: Array) -> Array:
    """int8 ``[64, O]`` to bfloat16 ``[128, O]``, 136 added; even rows first, then odd ones.

    Four bytes a word: a shift and a mask leave two nibbles, which are two neighbouring rows of a
    bfloat16 register once the bits of 128 are set.
    """
    words = pltpu.bitcast(packed, jnp.int32) ^ np.uint32(0x88888888).astype(np.int32)
    quarters = [((words >> shift) & 0x000F000F) | _MAGIC for shift in (0, 4, 8, 12)]
    return jnp.concatenate([pltpu.bitcast(q, jnp.bfloat16) for q in quarters], axis=0)


def _fp8_bits(block: Array) -> Array:
    """e4m3 ``[128, O]`` to bfloat16 times ``2**-120``; even rows first, then odd ones.

    Sign, exponent and mantissa move to their places, two bytes a word at a time; the exponents'
    biases differ by 120. Subnormal values, below ``2**-6`` where 448 is the largest, may become 0:
    the matrix unit takes them so. The casts of the chips without fp8 cost four times as much.
    """
    words = pltpu.bitcast(block, jnp.int32)
    even = ((words & 0x007F007F) << 4) | ((words & 0x00800080) << 8)
    odd = ((words >> 4) & 0x07F007F0) | (words & np.uint32(0x80008000).astype(np.int32))
    return jnp.concatenate([pltpu.bitcast(w, jnp.bfloat16) for w in (even, odd)], axis=0)


def _dot(rows: Array, block: Array) -> Array:
    precision = jax.lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None
    return jnp.dot(rows, block, precision=precision, preferred_element_type=jnp.float32)
