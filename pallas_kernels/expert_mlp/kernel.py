"""The Pallas TPU kernel: experts stream through VMEM, tokens and results stay in it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.expert_mlp.routing import Touched
from pallas_kernels.expert_mlp.tuning import Tiles
from pallas_kernels.expert_mlp.weights import (
    FP8_SHIFT,
    flat_scales,
    group_order,
    is_shuffled,
    product,
    row_sums,
    values_and_scales,
)
from pallas_kernels.quantized import GROUP, Matrix

_ROWS = 8  # gathered together, 1 << 3


def step_of(core: Any, i: Any, count: Any, cores: int) -> Any:
    """Which touched expert core ``core`` works on in its step ``i``; maybe ``count`` or more.

    Each core takes a run of them.
    """
    return core * _share(count, cores) + i


def _share(count: Any, cores: int) -> Any:
    return count if cores == 1 else (count + 1) >> 1  # no //: it asks which chip it is on


def index_maps(cores: int) -> dict[str, Any]:
    """Block indices by grid step; they run on traced scalars and on numpy alike.

    They take ``(core, i, f, meta, ids, begin, tokens, gates)``; ``meta`` is ``[layer, count]``.
    """

    def expert(core, i, meta, ids):
        # A core without work left stays on the last expert: no new copy. Without any expert it
        # is the first.
        step = step_of(core, i, meta[1], cores)
        last = meta[1] - (meta[1] > 0)
        return ids[step * (step <= last) + last * (step > last)]

    def columns(core, i, f, meta, ids, *_):
        return meta[0], expert(core, i, meta, ids), 0, f

    def rows(core, i, f, meta, ids, *_):
        return meta[0], expert(core, i, meta, ids), f, 0

    def whole(core, i, f, meta, ids, *_):
        return meta[0], expert(core, i, meta, ids), 0, 0

    def flat(core, i, f, meta, ids, *_):
        return 0, expert(core, i, meta, ids), 0, 0

    return {
        "x": lambda core, i, f, *_: (0, 0),
        "columns": columns,
        "rows": rows,
        "whole": whole,
        "flat": flat,
        "out": lambda core, i, f, *_: (core, 0, 0),
    }


def blocks_of(matrix: Any, tile: int, is_down: bool) -> list[tuple[tuple[int, ...], str]]:
    """Block shape and index map of a stack's values, and of its scales.

    Args:
      matrix: ``[layers, E, D, F]``, or ``[layers, E, F, D]`` if ``is_down``.
      tile: columns of F a grid step.
      is_down: whether F is contracted.
    """
    full = matrix.shape[-2] if is_down else matrix.shape[-1]
    blocks = []
    for i, array in enumerate(values_and_scales(matrix)):
        rows, columns = array.shape[-2:]
        if i and matrix.scheme == "fp8":  # pyright: ignore[reportAttributeAccessIssue]
            blocks.append(((1, 1, rows, columns), "flat"))
        elif full == tile or (is_down and rows == 1):
            blocks.append(((1, 1, rows, columns), "whole"))
        elif is_down:
            blocks.append(((1, 1, rows * tile // full, columns), "rows"))
        else:
            blocks.append(((1, 1, rows, columns * tile // full), "columns"))
    return blocks


def expert_mlp_pallas(
    x: Float[Array, "M D"],
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    touched: Touched,
    layer: Int[Array, ""],
    tiles: Tiles,
    out_dtype: Any,
    cores: int = 1,
) -> Float[Array, "M D"]:
    """The sum over a token's experts; see ``api.expert_mlp``.

    Args:
      x: tokens.
      gate, up: ``[layers, E, D, F]``.
      down: ``[layers, E, F, D]``.
      touched: the pairs, sorted by expert.
      layer: which layer's experts.
      tiles: see ``tuning``.
      out_dtype: of the result.
      cores: tensor cores that share the experts.
    """
    tokens, dim = x.shape
    ffn = gate.shape[-1]
    packed = x.dtype == jnp.bfloat16 and dim % 256 == 0
    contracted = values_and_scales(gate)[0].shape[-2]
    schemes = tuple(getattr(m, "scheme", None) for m in (gate, up, down))
    if schemes[0] == "int4":
        contracted *= 2
        x = jnp.pad(x, ((0, 0), (0, contracted - dim)))
        packed = x.dtype == jnp.bfloat16 and contracted % 256 == 0
    if is_shuffled(schemes[0], contracted, x.dtype):
        x = x.reshape(tokens, -1, GROUP)[..., group_order()].reshape(tokens, -1)
        if schemes[0] == "fp8":
            x = x * jnp.asarray(2.0**FP8_SHIFT, x.dtype)
    dtype = x.dtype
    if packed:
        bits = jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)
        half = contracted // 2
        x = jax.lax.bitcast_convert_type(bits[:, :half] | (bits[:, half:] << 16), jnp.int32)
    else:
        x = x.astype(jnp.float32)
    maps = index_maps(cores)
    gate, up, down = (flat_scales(m, layer) for m in (gate, up, down))
    operands, specs = [], []
    for matrix, is_down in ((gate, False), (up, False), (down, True)):
        for array, (block, name) in zip(
            values_and_scales(matrix), blocks_of(matrix, tiles.columns, is_down), strict=True
        ):
            operands.append(array)
            specs.append(pl.BlockSpec(block, maps[name]))
    steps = jnp.maximum(1, _share(touched.count, cores))
    weight_bytes = sum(a.size // (a.shape[0] * a.shape[1]) * a.dtype.itemsize for a in operands)
    hidden = -(-tiles.columns // 128) * 128
    body = functools.partial(
        _kernel, schemes=schemes, ffn=ffn, height=tiles.rows, cores=cores, dtype=dtype,
        packed=packed, wide=tiles.chunk,
    )  # fmt: skip
    pairs = len(touched.tokens)
    out = pl.pallas_call(
        body,
        name="expert_mlp",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(cores, steps, ffn // tiles.columns),
            in_specs=[
                pl.BlockSpec(x.shape, maps["x"], pipeline_mode=pl.Buffered(1)),
                *specs,
            ],
            out_specs=pl.BlockSpec(
                (1, tokens, dim), maps["out"], pipeline_mode=pl.Buffered(1)
            ),
            scratch_shapes=[
                pltpu.VMEM((tokens, dim), jnp.float32),  # sum over experts
                pltpu.VMEM((tiles.rows, x.shape[1]), x.dtype),  # a tile of rows, as gathered
                pltpu.VMEM((tiles.rows, contracted), dtype),  # the same, unpacked
                pltpu.VMEM((tiles.rows, tiles.chunk[0]), jnp.float32),  # a chunk of silu(gate)
                pltpu.VMEM((tiles.rows, hidden), dtype),  # silu(gate) * up
                pltpu.VMEM((tiles.rows, dim), jnp.float32),  # the tile's results
                pltpu.VMEM((max(contracted, hidden) // 128 or 1, tiles.rows, 128), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(
            (cores, tokens, dim), out_dtype if cores == 1 else jnp.float32
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=tiles.vmem_bytes,
        ),
        cost_estimate=pl.CostEstimate(
            flops=6 * pairs * dim * ffn,
            transcendentals=pairs * ffn,
            bytes_accessed=min(pairs, gate.shape[1]) * weight_bytes + 6 * tokens * dim,
        ),
    )(
        jnp.stack([layer.astype(jnp.int32), touched.count.astype(jnp.int32)]),
        touched.ids, touched.begin, touched.tokens, touched.gates, x, *operands,
    )  # fmt: skip
    return out[0] if cores == 1 else out.sum(0).astype(out_dtype)


def _kernel(
    meta,  # [2] layer, touched experts
    ids,  # [E] touched experts
    begin,  # [E + 1] first pair of each touched expert
    tokens,  # [pairs] token of each pair
    gates,  # [pairs] float32
    x,  # [M, D] float32, or [M, D/2] two bfloat16 in an int32: columns j and j + D/2
    *refs,  # weights, scales [1, 1, rows, columns]; out [1, M, D]; scratch
    schemes, ffn, height, cores, dtype, packed, wide,
):  # fmt: skip
    weights = []
    position = 0
    for scheme in schemes:
        size = 1 if scheme is None else 2
        weights.append(refs[position : position + size])
        position += size
    # [1, M, D], [M, D], [R, D or D/2], [R, D], [R, chunk], [R, F], [R, D], [D/128, R, 128]
    out, total, gathered, rows, gated, hidden, result, sums = refs[position:]
    core, i, f = (pl.program_id(axis) for axis in range(3))
    step = step_of(core, i, meta[1], cores)

    @pl.when((i == 0) & (f == 0))
    def _():
        def clear(at):
            total[at, :] = jnp.zeros((at.size, total.shape[1]), jnp.float32)

        _by_rows(total, clear)

    @pl.when(step < meta[1])
    def _():
        first, last = begin[step], begin[step + 1]

        @pl.loop(0, (last - first + height - 1) >> (height.bit_length() - 1))
        def _(tile):
            start = first + tile * height
            count = jnp.minimum(last - start, height)
            with jax.named_scope("gather"):
                _gather(x, tokens, start, count, gathered)
                _unpack(gathered, rows, packed)
            with jax.named_scope("gate_up"):
                row_sums(rows, sums, schemes[0])
                columns = weights[0][0].shape[-1]
                if columns % GROUP:  # the last tile's values were shuffled into the padding
                    hidden[...] = jnp.zeros_like(hidden)

                def gate_up(at, size):
                    where = at, size, dtype, ffn, f * columns
                    g = product(rows, sums, weights[0], schemes[0], *where)
                    # Stored: together with the next product it would not fit in registers.
                    gated[:, :size] = g * jax.nn.sigmoid(g)
                    u = product(rows, sums, weights[1], schemes[1], *where)
                    hidden[:, pl.ds(at, size)] = (gated[:, :size] * u).astype(dtype)

                _by_columns(columns, wide[0], gate_up)
            with jax.named_scope("down"):
                if is_shuffled(schemes[2], weights[2][0].shape[2], dtype):
                    _shuffle(hidden, 2.0**FP8_SHIFT if schemes[2] == "fp8" else 1.0)
                row_sums(hidden, sums, schemes[2])

                depth = hidden.shape[-1]

                def down(at, size):
                    result[:, pl.ds(at, size)] = product(
                        hidden,
                        sums,
                        weights[2],
                        schemes[2],
                        at,
                        size,
                        dtype,
                        result.shape[1],
                        0,
                        f * depth,
                    )

                _by_columns(result.shape[-1], wide[1], down)
            with jax.named_scope("scatter"):

                @pl.loop(0, count)
                def _(r):
                    at = pl.ds(tokens[start + r], 1)
                    total[at, :] += result[pl.ds(r, 1), :] * gates[start + r]

    @pl.when((i == pl.num_programs(1) - 1) & (f == pl.num_programs(2) - 1))
    def _():
        def write(at):
            out[0, at, :] = total[at, :].astype(out.dtype)

        _by_rows(total, write)


def _by_rows(ref: Any, do: Any) -> None:
    """``do`` for slices of 16 rows, then for the rest."""
    whole = ref.shape[0] // 16
    if whole:
        pl.loop(0, whole)(lambda r: do(pl.ds(pl.multiple_of(r * 16, 16), 16)))
    if ref.shape[0] % 16:
        do(pl.ds(whole * 16, ref.shape[0] % 16))


def _by_columns(columns: int, wide: int, do: Any) -> None:
    """``do(start, size)`` for chunks of ``wide`` columns, then for the rest."""
    whole = columns // wide
    if whole == 1:
        do(0, wide)
    elif whole:
        pl.loop(0, whole)(lambda c: do(pl.multiple_of(c * wide, wide), wide))
    if columns % wide:
        do(whole * wide, columns % wide)


def _gather(x, tokens, start, count, gathered) -> None:
    """Rows beyond ``count`` hold anything: nobody reads their results."""

    @pl.loop(0, (count + _ROWS - 1) >> 3)
    def _(group):
        at = pl.multiple_of(group * _ROWS, _ROWS)
        for r in range(_ROWS):  # past the last pair there is padding: token 0
            gathered[pl.ds(at + r, 1), :] = x[pl.ds(tokens[start + at + r], 1), :]


def _unpack(gathered, rows, packed: bool) -> None:
    if not packed:
        rows[...] = gathered[...].astype(rows.dtype)
        return
    half = gathered.shape[1]

    def unpack(at):
        words = gathered[at, :]
        rows[at, :half] = pltpu.bitcast(words << 16, jnp.float32).astype(rows.dtype)
        rows[at, half:] = pltpu.bitcast(words & ~0xFFFF, jnp.float32).astype(rows.dtype)

    _by_rows(gathered, unpack)


def _shuffle(hidden, factor: float) -> None:
    """Columns of each group in the order in which weights come out: a product on the MXU."""
    into = jax.lax.broadcasted_iota(jnp.int32, (GROUP, GROUP), 1)
    out_of = jax.lax.broadcasted_iota(jnp.int32, (GROUP, GROUP), 0)
    source = ((into & (GROUP // 2 - 1)) << 1) | (into >= GROUP // 2).astype(jnp.int32)
    order = (out_of == source).astype(jnp.float32).astype(hidden.dtype)
    precision = jax.lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None
    for g in range(hidden.shape[1] // GROUP):
        at = slice(g * GROUP, (g + 1) * GROUP)
        moved = jnp.dot(
            hidden[:, at], order, precision=precision, preferred_element_type=jnp.float32
        )
        hidden[:, at] = (moved * factor).astype(hidden.dtype)
