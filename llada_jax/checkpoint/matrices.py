"""Host-side matrix work: copies that transpose, casts, the search for NaN and infinity."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np

CHUNK_BYTES = 8 << 20  # of a tensor that are in flight per thread
_STRIP = 8  # rows of the source that are transposed at a time: they stay in the cache
_ALIGNMENT = 64  # bytes; JAX takes over a host buffer without a copy if it is aligned so

_BITS = {2: (np.int16, np.uint16), 4: (np.int32, np.uint32)}
_scratch = threading.local()


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised array that ``jax.device_put`` adopts on a CPU instead of copying it."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def scratch(rows: int, cols: int, dtype: Any) -> np.ndarray:
    """A ``[rows, cols]`` work buffer of this thread; the next call reuses its memory."""
    nbytes = rows * cols * np.dtype(dtype).itemsize
    buffer = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.nbytes < nbytes:
        buffer = _scratch.buffer = np.empty(nbytes, np.uint8)
    return buffer[:nbytes].view(dtype).reshape(rows, cols)


def chunk_rows(cols: int, itemsize: int) -> int:
    """How many rows make up ``CHUNK_BYTES``; at least one."""
    return max(1, CHUNK_BYTES // max(1, cols * itemsize))


def copy_matrix(out: np.ndarray, source: np.ndarray) -> None:
    """``out[...] = source`` for two matrices of one type, either of them possibly transposed.

    A plain strided copy of a big matrix misses the cache at every element; strips of a few of the
    source's contiguous lines do not (3 times as fast).
    """
    bits = _BITS[out.dtype.itemsize][1]  # numpy copies its own types faster than bfloat16
    out, source = out.view(bits), source.view(bits)
    flipped = source.strides[0] < source.strides[1]
    if flipped:
        out, source = out.T, source.T
    if out.strides[0] >= out.strides[1]:
        np.copyto(out, source)
        return
    for row in range(0, len(source), _STRIP):
        out[row : row + _STRIP] = source[row : row + _STRIP]


def cast(block: np.ndarray, dtype: Any) -> np.ndarray:
    """Rounds to nearest even, as XLA does; overflow becomes infinity without a warning."""
    if block.dtype == dtype:
        return block
    with np.errstate(all="ignore"):
        return block.astype(dtype)


def all_finite(block: np.ndarray) -> bool:
    """Whether a contiguous block holds neither NaN nor infinity.

    Read as integers, these are the largest positive and the largest negative patterns of their
    type: two maxima find them, without a temporary array.
    """
    signed, unsigned = _BITS[block.dtype.itemsize]
    mantissa = {"float16": 10, "bfloat16": 7, "float32": 23}[block.dtype.name]
    sign = 1 << (8 * block.dtype.itemsize - 1)
    infinity = sign - (1 << mantissa)  # all exponent bits set
    return bool(
        block.size == 0
        or (block.view(signed).max() < infinity and block.view(unsigned).max() < infinity + sign)
    )
