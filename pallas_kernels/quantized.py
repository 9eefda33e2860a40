"""Quantised matrices: int8 a channel, fp8 in blocks, int4 in groups.

A weight ``[..., I, O]`` (I is contracted) becomes integers or 8-bit floats with float32 scales:

    scheme   values                       scales                 a value's scale is that of its
    int8     int8 [..., I, O]             [..., 1, O]            column
    fp8      float8_e4m3fn [..., I, O]    [..., I/128, O/128]    block of 128 x 128
    int4     int8 [..., I/2, O], packed   [..., I/G, O]          group of G rows of its column

G is 128. Sizes that 128 does not divide are rounded up: the last block or group is smaller. int4
holds two rows a byte: of each group of G rows, rows 0 .. G/2-1 in the low and the others in the
high nibble, so that unpacking a group is one concatenation (I is padded to whole groups).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SCHEMES = ("int8", "fp8", "int4")

BLOCK = 128  # side of an fp8 block
GROUP = 128  # rows of an int4 group
_FP8_MAX = 448.0
_TINY = 1e-30


@no_type_check  # a pytree also holds tracers, shapes, shardings
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "scales"),
    meta_fields=("scheme", "rows"),
)
@dataclasses.dataclass(frozen=True)
class QuantizedMatrix:
    """A stack of quantised matrices ``[..., I, O]``; the layout is in the module's docstring.

    Attributes:
      values: int8 or float8_e4m3fn.
      scales: float32.
      scheme: how to read them.
      rows: I.
    """

    values: Any
    scales: Any
    scheme: str
    rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrices that are meant: ``[..., I, O]``."""
        return (*self.values.shape[:-2], self.rows, self.values.shape[-1])

    @property
    def nbytes(self) -> int:
        """Bytes in memory, scales included."""
        return sum(a.size * a.dtype.itemsize for a in (self.values, self.scales))


Matrix = Array | QuantizedMatrix


def quantize(weight: Float[Array, "*stack I O"], scheme: str) -> QuantizedMatrix:
    """Rounds a weight to the nearest values of ``scheme``; scales map the largest magnitude.

    A block of zeros (nothing above 1e-30) gets scale 1. The result depends on ``weight``'s values
    alone, so a weight quantised at import equals one quantised later. Hence products with inverses:
    a division by a constant or a broadcast value is such a product in some compiled programs and a
    division in others, and rounds differently.

    Raises:
      ValueError: for an unknown scheme.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"quantisation {scheme!r} is none of {', '.join(SCHEMES)}")
    weight = weight.astype(jnp.float32)
    rows = weight.shape[-2]
    if scheme == "int8":
        scales = _scale(jnp.abs(weight).max(-2, keepdims=True), 127.0)
        return QuantizedMatrix(_round(weight * (1 / scales), 127), scales, scheme, rows)
    if scheme == "fp8":
        tiles = _tiled(weight, BLOCK, BLOCK)  # [..., I/128, 128, O/128, 128]
        scales = _scale(jnp.abs(tiles).max((-3, -1)), _FP8_MAX)
        weight = weight * _spread(1 / scales, BLOCK, BLOCK, weight.shape)
        return QuantizedMatrix(weight.astype(jnp.float8_e4m3fn), scales, scheme, rows)
    groups = _tiled(weight, GROUP, 1)[..., 0]  # [..., I/G, G, O]
    scales = _scale(jnp.abs(groups).max(-2), 7.0)
    nibbles = _round(groups * (1 / scales[..., None, :]), 7)
    low, high = nibbles[..., : GROUP // 2, :], nibbles[..., GROUP // 2 :, :]
    packed = (low & 0xF) | (high << 4)
    packed = packed.reshape(*weight.shape[:-2], -1, weight.shape[-1])
    return QuantizedMatrix(packed, scales, scheme, rows)


def dequantize(matrix: QuantizedMatrix, dtype: Any = jnp.float32) -> Float[Array, "*stack I O"]:
    """The matrices that are meant: values times scales in float32, then cast."""
    shape = matrix.shape
    if matrix.scheme == "int8":
        full = matrix.values.astype(jnp.float32) * matrix.scales
    elif matrix.scheme == "fp8":
        full = matrix.values.astype(jnp.float32) * _spread(matrix.scales, BLOCK, BLOCK, shape)
    else:
        groups = unpack_int4(matrix.values).astype(jnp.float32)
        full = groups.reshape(*shape[:-2], -1, GROUP, shape[-1]) * matrix.scales[..., None, :]
        full = full.reshape(*shape[:-2], -1, shape[-1])[..., : shape[-2], :]
    return full.astype(dtype)


def unpack_int4(packed: Array) -> Array:
    """int8 ``[..., I/2, O]`` with two rows a byte to int8 ``[..., I, O]`` in [-8, 7]."""
    half = GROUP // 2
    tiles = packed.reshape(*packed.shape[:-2], -1, half, packed.shape[-1])
    low, high = (tiles << 4) >> 4, tiles >> 4  # arithmetic shifts keep the sign
    return jnp.concatenate([low, high], axis=-2).reshape(
        *packed.shape[:-2], 2 * packed.shape[-2], packed.shape[-1]
    )


def matmul(
    x: Float[Array, "*batch I"], matrix: Matrix, precision: Any = None
) -> Float[Array, "*batch O"]:
    """``x @ matrix`` in ``x``'s type, for one matrix ``[I, O]``, quantised or not.

    int8 values go into the product as they are and the scale comes after it; the other schemes are
    dequantised on the way in.
    """
    if not isinstance(matrix, QuantizedMatrix):
        return jnp.matmul(x, matrix.astype(x.dtype), precision=precision)
    if matrix.scheme != "int8":
        return jnp.matmul(x, dequantize(matrix, x.dtype), precision=precision)
    product = jnp.matmul(
        x,
        matrix.values.astype(x.dtype),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return (product * matrix.scales[0]).astype(x.dtype)


def _scale(largest: Array, limit: float) -> Array:
    return jnp.where(largest > _TINY, largest * jnp.float32(1 / limit), 1.0).astype(jnp.float32)


def _round(x: Array, limit: int) -> Array:
    return jnp.clip(jnp.round(x), -limit, limit).astype(jnp.int8)


def _tiled(weight: Array, height: int, width: int) -> Array:
    """[..., I, O] zero-padded and cut: [..., I/height, height, O/width, width]."""
    rows, cols = weight.shape[-2:]
    padding = [(0, 0)] * (weight.ndim - 2) + [(0, -rows % height), (0, -cols % width)]
    weight = jnp.pad(weight, padding)
    if width == 1:
        return weight.reshape(*weight.shape[:-2], -1, height, cols, 1)
    return weight.reshape(*weight.shape[:-2], (rows + padding[-2][1]) // height, height, -1, width)


def _spread(scales: Array, height: int, width: int, shape: tuple[int, ...]) -> Array:
    """Block scales repeated over their blocks, cut to the matrix."""
    full = jnp.repeat(jnp.repeat(scales, height, axis=-2), width, axis=-1)
    return full[..., : shape[-2], : shape[-1]]
