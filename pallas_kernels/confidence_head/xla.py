"""The confidence head in plain XLA: the vocabulary in chunks, so that ``[M, V]`` never exists.

Small problems are one chunk, without a loop: what the caller does not use is then not computed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.confidence_head.kernel import Adjustment
from pallas_kernels.confidence_head.statistics import (
    LOWEST,
    NO_TOKEN,
    Statistics,
    merge,
    of_scores,
)
from pallas_kernels.quantized import BLOCK, GROUP, Matrix, QuantizedMatrix, unpack_int4

_MAX_SCORES = 1 << 24  # of a chunk: 64 MiB


def statistics(
    hidden: Float[Array, "M D"], head: Matrix, adjustment: Adjustment, transposed: bool = False
) -> Statistics:
    """Statistics of each position's scores; the arguments are those of ``kernel.statistics``."""
    m, v = hidden.shape[0], vocabulary_of(head, transposed)
    width = min(v, max(1024, _MAX_SCORES // m // 1024 * 1024))

    def chunk(start: Int[Array, ""] | int) -> Statistics:
        # The last chunk reaches back over columns that were seen before: they count as gone.
        first = jnp.minimum(start, v - width) if width < v else 0
        scores = _scores(hidden, head, first, width, transposed)
        column = first + jnp.arange(width)
        if width < v:
            scores = jnp.where(column < start, LOWEST, scores)
        return of_scores(_adjust(scores, column, adjustment), first)

    if width == v:
        return chunk(0)

    def add(i: Int[Array, ""], memory: Statistics) -> Statistics:
        both = Statistics(*map(jnp.stack, zip(memory, chunk(i * width), strict=True)))
        return merge(both, axis=0)

    empty = (LOWEST, LOWEST, NO_TOKEN, NO_TOKEN, 0.0, 0.0)
    empty = Statistics(*(jnp.full(m, x, jnp.float32) for x in empty))
    return jax.lax.fori_loop(0, -(-v // width), add, empty)


def vocabulary_of(head: Matrix, transposed: bool) -> int:
    """V."""
    return head.shape[0 if transposed else 1]


def _adjust(scores: Array, column: Array, adjustment: Adjustment) -> Array:
    banned, penalised, penalty = (x[:, None] for x in adjustment)
    scores = jnp.where(column == penalised, scores - penalty, scores)
    return jnp.where(column == banned, LOWEST, scores)


def _scores(
    hidden: Array, head: Matrix, first: Int[Array, ""] | int, width: int, transposed: bool
) -> Float[Array, "M W"]:
    """float32 scores of ``width`` columns from ``first`` on."""
    precision = jax.lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None

    def product(values: Array, contracted: int = 0) -> Array:
        return jax.lax.dot_general(
            hidden,
            values.astype(hidden.dtype),
            (((1,), (contracted,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    def columns(x: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, first, width, 1) if width < x.shape[1] else x

    if not isinstance(head, QuantizedMatrix):
        if not transposed:
            return product(columns(head))
        rows = jax.lax.dynamic_slice_in_dim(head, first, width) if width < len(head) else head
        return product(rows, 1)
    if head.scheme == "int8":
        return product(columns(head.values)) * columns(head.scales)
    values, scales, depth = columns(head.values), head.scales, GROUP
    if head.scheme == "fp8":  # a chunk may begin within a block: the scale of each column
        scales, depth = scales[:, (first + jnp.arange(width)) // BLOCK], BLOCK
    else:
        values, scales = unpack_int4(values), columns(scales)
    scales = jnp.repeat(scales, depth, axis=0)[: values.shape[0]]
    full = values.astype(jnp.float32) * scales
    return product(full[: head.rows].astype(hidden.dtype))
