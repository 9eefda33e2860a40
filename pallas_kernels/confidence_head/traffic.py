"""Bytes that the kernel moves between HBM and VMEM, from its own block index maps."""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax.numpy as jnp

from pallas_kernels.confidence_head.kernel import blocks, grid
from pallas_kernels.confidence_head.tuning import LANES, choose


def traffic(m: int, d: int, v: int, *, hidden: Any = jnp.bfloat16, head: Any = jnp.bfloat16) -> int:
    """Bytes fetched and written for ``[M, D] x [D, V]``.

    Walks the grid as the pipeline does: a block is fetched when its index differs from the step
    before, and so once for each partition, which may run on another core. Only the part of a block
    within the array moves; narrow arrays count with their padding to 128 lanes.

    Args:
      m, d, v: positions, model width, vocabulary.
      hidden, head: types; int8 brings a float32 scale a column.
    """
    hidden, head = jnp.dtype(hidden), jnp.dtype(head)
    tiling = choose(m, d, v, hidden.itemsize, head.itemsize)
    cut = blocks(tiling, d, v)
    rows = tiling.rows * tiling.row_tiles
    points = list(itertools.product(*map(range, grid(tiling))))
    # Narrow arrays lie in memory with their padding to 128 lanes.
    operands = [(cut.hidden, (rows, d), hidden.itemsize), (cut.values, (d, v), head.itemsize)]
    if head == jnp.int8:
        operands.append((cut.scales, (1, v), 4))
    operands.append((cut.rows._replace(shape=(tiling.rows, LANES)), (rows, LANES), 4))
    total = 4 * (rows // tiling.chunk_rows) * (len(points) // tiling.row_tiles)
    total *= tiling.column_chunks  # the marks
    for block, shape, itemsize in operands:
        before = None
        for point in points:
            index = tuple(int(i) for i in block.index(*point, None))
            if (point[0], index) != before:
                sides = zip(block.shape, shape, index, strict=True)
                total += itemsize * math.prod(min(b, size - i * b) for b, size, i in sides)
            before = point[0], index
    written = {tuple(int(i) for i in cut.out.index(*point, None)) for point in points}
    return total + len(written) * 4 * math.prod(cut.out.shape)


def least_bytes(
    m: int, d: int, v: int, *, hidden: Any = jnp.bfloat16, head: Any = jnp.bfloat16
) -> int:
    """Bytes that any program must move: hidden states, head (and scales), results."""
    hidden, head = jnp.dtype(hidden), jnp.dtype(head)
    scales = 4 * v if head == jnp.int8 else 0
    return m * d * hidden.itemsize + d * v * head.itemsize + scales + 6 * 4 * m
