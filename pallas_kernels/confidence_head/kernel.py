"""The Pallas TPU kernel of the confidence head.

    for every partition p of the vocabulary                    (parallel: two cores on v5p)
      for every tile of rows                                   (one, up to 1024 rows)
        for every tile t of the partition's columns            (fetched once)
          for every chunk of columns, for every chunk of rows:
            scores = hidden @ head                             (MXU, into a buffer in VMEM)
            mend the scores, if the chunk is marked
            add them to the memory of the rows                 (VPU)

The memory stays 128 lanes wide (a lane sees every 128th column) and is merged over lanes once, at
the end. Bans, penalties and the columns past the end touch few chunks: those are marked
beforehand, and only they are mended.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.confidence_head.statistics import LOWEST, NO_TOKEN, Statistics, merge
from pallas_kernels.confidence_head.tuning import LANES, Tiling, choose

_SUBLANES = 8
_STATISTICS = len(Statistics._fields)
_CONVERT_ROWS = 64
# Blocks of the product. Partial sums rest in VMEM: longer blocks make the compiler spill registers.
_BLOCK_DEPTH = 256  # along D: the matrix unit's size from v6e on
_BLOCK_COLUMNS = 256  # along V
_SEGMENT = 2048  # of D in one stretch of code, as with few rows longer ones spill too
_ROWS_OF_ONE_SEGMENT = 256


class Adjustment(NamedTuple):
    """Changes to the scores; float32 ``[M]``. Ids below 0 match nothing."""

    banned: Float[Array, " M"]
    penalised: Float[Array, " M"]
    penalty: Float[Array, " M"]


def statistics(
    hidden: Float[Array, "M D"],
    values: Array,
    scales: Float[Array, "1 V"] | None,
    adjustment: Adjustment,
    transposed: bool = False,
) -> Statistics:
    """Statistics of each position's scores.

    Args:
      hidden: hidden states.
      values: the head ``[D, V]`` (``[V, D]`` if transposed), of any float type or int8.
      scales: multiply the scores' columns; with int8 values.
      adjustment: applied to the scores.
      transposed: whether the head lies in memory by vocabulary.
    """
    m, d = hidden.shape
    v = values.shape[0 if transposed else 1]
    tiling = choose(m, d, v, hidden.dtype.itemsize, values.dtype.itemsize)
    padded = tiling.rows * tiling.row_tiles
    hidden = jnp.pad(hidden, ((0, padded - m), (0, 0)))
    rows = jnp.stack(
        [jnp.pad(x.astype(jnp.float32), (0, padded - m), constant_values=-1) for x in adjustment],
        axis=-1,
    )  # [M, 3]
    cut = blocks(tiling, d, v, transposed)
    # Hidden states that never change need no second buffer.
    once: Any = pl.Buffered(1) if tiling.row_tiles == 1 else None
    in_specs = [
        cut.hidden.spec(pipeline_mode=once),
        cut.values.spec(),
        *([] if scales is None else [cut.scales.spec()]),
        cut.rows.spec(pipeline_mode=once),
    ]
    # A tile that several chunks of rows read is cast once, else on its way into the product.
    convert = values.dtype != hidden.dtype and tiling.row_chunks > 1
    scratch = [
        pltpu.VMEM((_STATISTICS, tiling.rows, LANES), jnp.float32),
        pltpu.VMEM((tiling.chunk_rows, tiling.chunk_columns), jnp.float32),
    ]
    if convert:
        scratch.append(pltpu.VMEM(cut.values.shape, hidden.dtype))
    operands = [hidden, values, *([] if scales is None else [scales]), rows]
    out = pl.pallas_call(
        functools.partial(
            _kernel,
            tiling=tiling,
            vocabulary=v,
            transposed=transposed,
            scaled=scales is not None,
            convert=convert,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid(tiling),
            in_specs=in_specs,
            out_specs=cut.out.spec(),
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct((tiling.partitions, padded, LANES), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=56 << 20,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * padded * d * v,
            transcendentals=padded * v,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in operands)
            + (tiling.row_tiles - 1) * values.size * values.dtype.itemsize
            + tiling.partitions * padded * LANES * 4,
        ),
        name="confidence_head",
    )(_marks(tiling, v, rows), *operands)
    return merge(Statistics(*(out[:, :m, i] for i in range(_STATISTICS))), axis=0)


def grid(tiling: Tiling) -> tuple[int, int, int]:
    """Partitions, row tiles, column tiles of a partition."""
    return tiling.partitions, tiling.row_tiles, tiling.tiles


class Block(NamedTuple):
    """What of an array is in VMEM at a point of the grid: block number ``index(*point, marks)``."""

    shape: tuple[int, ...]
    index: Callable[..., tuple[Any, ...]]

    def spec(self, **options: Any) -> pl.BlockSpec:
        """For ``pallas_call``."""
        return pl.BlockSpec(self.shape, self.index, **options)


class Blocks(NamedTuple):
    """The blocks of each operand and of the output."""

    hidden: Block
    values: Block
    scales: Block
    rows: Block
    out: Block


def blocks(tiling: Tiling, d: int, v: int, transposed: bool = False) -> Blocks:
    """What is fetched at each point of the grid, and written."""
    last = -(-v // tiling.columns) - 1

    def column_tile(p, t):
        # A partition may reach past the end: then the last tile stays where it is.
        return jnp.minimum(p * tiling.tiles + t, last)

    def of_rows(p, r, t, marks):
        return r, 0

    def of_columns(p, r, t, marks):
        return 0, column_tile(p, t)

    def of_columns_transposed(p, r, t, marks):
        return column_tile(p, t), 0

    def of_out(p, r, t, marks):
        return p, r, 0

    values = Block((d, tiling.columns), of_columns)
    if transposed:
        values = Block((tiling.columns, d), of_columns_transposed)
    return Blocks(
        hidden=Block((tiling.rows, d), of_rows),
        values=values,
        scales=Block((1, tiling.columns), of_columns),
        rows=Block((tiling.rows, 3), of_rows),
        out=Block((1, tiling.rows, LANES), of_out),
    )


def _marks(tiling: Tiling, v: int, rows: Array) -> Array:
    """int32 [column chunks, row chunks]: 1 where a chunk's scores must be mended."""
    width = tiling.chunk_columns
    count = tiling.partitions * tiling.tiles * tiling.column_chunks
    start = (width * jnp.arange(count, dtype=jnp.float32))[:, None, None]
    banned, penalised, penalty = rows.T.reshape(3, 1, -1, tiling.chunk_rows)
    hit = (banned >= start) & (banned < start + width)
    hit |= (penalised >= start) & (penalised < start + width) & (penalty != 0)
    return (hit.any(-1) | (start[..., 0] + width > v)).astype(jnp.int32)


def _kernel(
    marks_ref,  # SMEM int32 [column chunks, row chunks]
    hidden_ref,  # [rows, D]
    values_ref,  # [D, columns] or [columns, D]
    *refs,
    tiling: Tiling,
    vocabulary: int,
    transposed: bool,
    scaled: bool,
    convert: bool,
):
    rest = list(refs)
    scales_ref = rest.pop(0) if scaled else None  # f32 [1, columns]
    rows_ref = rest.pop(0)  # f32 [rows, 3]: banned, penalised, penalty
    out_ref = rest.pop(0)  # f32 [1, rows, 128], of which the first six lanes count
    memory_ref = rest.pop(0)  # f32 [6, rows, 128]
    buffer = rest.pop(0)  # f32 [chunk_rows, chunk_columns]
    head_ref = rest.pop(0) if convert else values_ref  # as values_ref, in hidden's type
    p, r, t = (pl.program_id(axis) for axis in range(3))
    first = (p * tiling.tiles + t) * tiling.column_chunks  # column chunk, over all partitions

    @pl.when(t == 0)
    def _():
        empty = (LOWEST, LOWEST, NO_TOKEN, NO_TOKEN, 0.0, 0.0)
        for i, value in enumerate(empty):
            memory_ref[i] = jnp.full(memory_ref.shape[1:], value, jnp.float32)

    if convert:
        _convert(values_ref, head_ref)

    @pl.loop(0, tiling.column_chunks)
    def _(column):
        window = _slice(column, tiling.chunk_columns)

        @pl.loop(0, tiling.row_chunks)
        def _(row):
            rows = _slice(row, tiling.chunk_rows)
            _product(
                hidden_ref.at[rows, :],
                head_ref.at[window, :] if transposed else head_ref.at[:, window],
                None if scales_ref is None else scales_ref.at[:, window],
                buffer,
                transposed,
            )

            @pl.when(marks_ref[first + column, r * tiling.row_chunks + row] != 0)
            def _():
                _mend(
                    rows_ref.at[rows, :],
                    buffer,
                    (first + column) * tiling.chunk_columns,
                    vocabulary,
                )

            group = (first + column) * (tiling.chunk_columns // LANES)
            _note(memory_ref.at[:, rows, :], buffer, group)

    @pl.when(t == tiling.tiles - 1)
    def _():
        _write(memory_ref, out_ref.at[0])


def _slice(chunk, size: int):
    return pl.ds(pl.multiple_of(chunk * size, size), size)


def _convert(values_ref, head_ref):
    """Casts the tile of the head, a few rows at a time so that it passes through registers."""
    height = values_ref.shape[0]
    step = _CONVERT_ROWS if height % _CONVERT_ROWS == 0 else height

    @pl.loop(0, height // step)
    def _(i):
        rows = _slice(i, step)
        head_ref[rows, :] = values_ref[rows, :].astype(head_ref.dtype)


def _product(hidden_ref, head_ref, scales_ref, buffer, transposed: bool):
    """Scores of a chunk.

    Args:
      hidden_ref: [chunk_rows, D].
      head_ref: [D, chunk_columns], or [chunk_columns, D] if transposed.
      scales_ref: f32 [1, chunk_columns], or None.
      buffer: f32 [chunk_rows, chunk_columns], written.
    """
    d = hidden_ref.shape[1]
    exact = hidden_ref.dtype == jnp.float32
    depth = _SEGMENT if d % _SEGMENT == 0 and buffer.shape[0] < _ROWS_OF_ONE_SEGMENT else d
    several = depth < d
    if several:
        buffer[...] = jnp.zeros(buffer.shape, jnp.float32)

    def add(segment):
        for n in range(0, buffer.shape[1], _BLOCK_COLUMNS):
            columns = slice(n, min(n + _BLOCK_COLUMNS, buffer.shape[1]))
            for k in range(0, depth, _BLOCK_DEPTH):
                size = min(_BLOCK_DEPTH, depth - k)
                part = (
                    pl.ds(pl.multiple_of(segment * depth + k, LANES), size)
                    if several
                    else (slice(k, k + size))
                )
                head = head_ref[columns, part] if transposed else head_ref[part, columns]
                scores = jax.lax.dot_general(
                    hidden_ref[:, part],
                    head.astype(hidden_ref.dtype),
                    (((1,), (1 if transposed else 0,)), ((), ())),
                    precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
                    preferred_element_type=jnp.float32,
                )
                buffer[:, columns] = scores + buffer[:, columns] if k or several else scores

    if several:
        pl.loop(0, d // depth)(add)
    else:
        add(0)
    if scales_ref is not None:
        buffer[...] *= scales_ref[...]


def _mend(rows_ref, buffer, start, vocabulary: int):
    """Applies the penalty, the ban and the end of the vocabulary to one chunk of scores.

    Args:
      rows_ref: f32 [chunk_rows, 3]: banned, penalised, penalty.
      buffer: f32 [chunk_rows, chunk_columns].
      start: id of the chunk's first column.
      vocabulary: V.
    """

    @pl.loop(0, buffer.shape[0] // _SUBLANES)
    def _(i):
        rows = _slice(i, _SUBLANES)
        banned, penalised, penalty = (rows_ref[rows, k : k + 1] for k in range(3))  # [8, 1]
        for c in range(0, buffer.shape[1], LANES):
            score = buffer[rows, c : c + LANES]
            lane = jax.lax.broadcasted_iota(jnp.int32, score.shape, 1)
            column = (lane + (start + c)).astype(jnp.float32)
            score = jnp.where(column == penalised, jnp.maximum(score - penalty, LOWEST), score)
            gone = (column == banned) | (column >= vocabulary)
            buffer[rows, c : c + LANES] = jnp.where(gone, LOWEST, score)


def _note(memory_ref, buffer, group):
    """Adds a chunk of scores to the memory of its rows, lane by lane.

    Args:
      memory_ref: f32 [6, chunk_rows, 128]; ids are those of 128-wide column groups.
      buffer: f32 [chunk_rows, chunk_columns].
      group: id of the chunk's first column group.
    """
    names = [(group + k).astype(jnp.float32) for k in range(buffer.shape[1] // LANES)]
    # Several registers of rows at once hide each other's latencies.
    step = next(n for n in (64, 32, 16) if buffer.shape[0] % n == 0)

    @pl.loop(0, buffer.shape[0] // step)
    def _(i):
        for offset in range(0, step, _SUBLANES):
            rows = pl.ds(pl.multiple_of(i * step + offset, _SUBLANES), _SUBLANES)
            scores = [buffer[rows, k * LANES : (k + 1) * LANES] for k in range(len(names))]
            old = Statistics(*(memory_ref[k, rows, :] for k in range(_STATISTICS)))
            for k, x in enumerate(_add(old, scores, names)):
                memory_ref[k, rows, :] = x


def _add(old: Statistics, scores: list[Array], names: list[Array]) -> Statistics:
    """One register of each statistic, and the scores that come to it with their groups' ids."""
    best, second, token, runner_up, total, weighted = old
    for score, name in zip(scores, names, strict=True):
        wins, places = score > best, score > second  # the earlier of equal scores stays ahead
        runner_up = jnp.where(wins, token, jnp.where(places, name, runner_up))
        token = jnp.where(wins, name, token)
        second = jnp.maximum(second, jnp.minimum(best, score))
        best = jnp.maximum(best, score)
    below = old.maximum - best  # the sums so far were relative to the maximum so far
    share = jnp.exp(below)
    weighted = (weighted + total * below) * share
    total *= share
    for score in scores:
        below = score - best
        odds = jnp.exp(below)
        total += odds
        weighted += odds * below
    return Statistics(best, second, token, runner_up, total, weighted)


def _write(memory_ref, out_ref):
    """Merges the lanes; the six numbers go to the first lanes of the output."""

    @pl.loop(0, out_ref.shape[0] // _SUBLANES)
    def _(i):
        rows = _slice(i, _SUBLANES)
        lane = jax.lax.broadcasted_iota(jnp.int32, (_SUBLANES, LANES), 1)
        parts = Statistics(*(memory_ref[k, rows, :] for k in range(_STATISTICS)))

        def column(group):
            return jnp.where(group < NO_TOKEN, group * LANES + lane.astype(jnp.float32), NO_TOKEN)

        parts = parts._replace(token=column(parts.token), runner_up=column(parts.runner_up))
        out = jnp.zeros((_SUBLANES, LANES), jnp.float32)
        for k, x in enumerate(merge(parts, axis=-1, keepdims=True)):
            out = jnp.where(lane == k, x, out)
        out_ref[rows, :] = out
