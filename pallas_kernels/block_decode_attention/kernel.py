"""The TPU kernel of decode attention: fresh tokens over a cached prefix, read where it lies.

A grid step is one row: its queries, its fresh keys and a loop over the live tiles of its cache. The
cache stays in HBM; tiles are copied by hand, several in flight, the next row's while this one is
computed. The last tile of a row is copied in pieces (a half, a quarter, …), so that no more than 31
positions beyond the row's length are read.

All query heads of a kv head form one matrix with columns ``t * G + g``. Scores are held as ``[keys,
queries]``: maxima and sums over keys are then sums of whole registers, a query's maximum takes one
lane, and the queries stay in the matrix unit while the keys stream through it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.block_decode_attention.tuning import (
    GRANULE,
    LANES,
    SUBLANES,
    Tiling,
    piece_sizes,
    round_up,
)

_GRANULE_BITS = GRANULE.bit_length() - 1
_TOGETHER = 256  # keys that one product scores
_FLOOR = -1e30  # below every score: the maximum of nothing, and finite
_ROW, _TILE, _STARTED, _TAKEN, _SCORED = range(5)  # the places of ``at``


def _fold(rows: Array, combine: Callable[[Array, Array], Array]) -> Array:
    """``[W, R]`` to ``[8, R]``, or unchanged where 8 does not divide W: register by register."""
    width = rows.shape[0]
    if width % SUBLANES:
        return rows
    return functools.reduce(combine, [rows[i : i + SUBLANES] for i in range(0, width, SUBLANES)])


def kernel(
    layer_ref,  # [2] int32: the layer of the cache, and that of its scales
    length_ref,  # [B] int32: valid cached positions
    fresh_ref,  # [B] int32: fresh keys seen
    causal_ref,  # [B] int32: 1 where fresh keys are seen block-causally
    query_ref,  # [1, heads, H, columns]
    key_ref,  # [1, heads, fresh, H]
    value_ref,  # [1, heads, fresh, H]
    cache_key_hbm,  # [layers, B, K, S, H]
    cache_value_hbm,  # [layers, B, K, S, H]
    *refs,
    tiles: Tiling,
    capacity: int,
    block_columns: tuple[int, int] | None,
    quantized: bool,
):
    """The body for one row and one group of kv heads; see the module's text.

    Args:
      tiles: the sizes.
      capacity: S.
      block_columns: tokens and packed queries of a block; ``None`` where no row is causal.
      quantized: the cache is int8; then its scales and their buffers are among ``refs``.
    """
    if quantized:
        key_scale_hbm, value_scale_hbm, *refs = refs  # [layers, B, K, lanes] float32
        *refs, key_scale_buffer, value_scale_buffer, scale_sems = (
            refs  # [depth, K, lanes], [2, depth]
        )
    (
        out_ref,  # [1, heads, H, columns]
        key_buffer,  # [depth, heads, tile, H]
        value_buffer,  # [depth, heads, tile, H]
        score_scratch,  # [2, unit, chunk] float32
        raw_largest_scratch,  # [2, 8, chunk] float32: the largest score is that of the eight
        largest_ref,  # [heads, 1, columns] float32
        total_ref,  # [heads, 8, columns] float32, a query's total is the sum of the eight
        mixed_ref,  # [heads, H, columns] float32
        sems,  # [2, depth]
        at,  # [5] int32: the row and tile to be fetched next; tiles started,
        #   tiles taken, units scored
        live_ref,  # [B + 1] int32: the first row from here on that has a cache
    ) = refs
    heads, head_dim, dtype = tiles.heads, query_ref.shape[-2], query_ref.dtype
    batch = length_ref.shape[0]
    group, row = pl.program_id(0), pl.program_id(1)
    length = length_ref[row]
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    to_exponent = head_dim**-0.5 * math.log2(math.e)  # exp(scale * s) = exp2(to_exponent * s)

    # --- copies -----------------------------------------------------------------------------
    def each_copy(of_row, tile_index, slot, act):
        """Calls ``act`` on the copies of a tile, those alone that hold valid positions."""
        start = tile_index * tiles.tile

        def both(hbm_pair, buffers, semaphores, hbm_at, buffer_at):
            for i, (hbm, buffer) in enumerate(zip(hbm_pair, buffers, strict=True)):
                act(
                    pltpu.make_async_copy(
                        hbm.at[hbm_at], buffer.at[buffer_at], semaphores.at[i, slot]
                    )
                )

        def piece(offset, size):
            from_ = pl.ds(pl.multiple_of(start + offset, GRANULE), size)
            to = pl.ds(pl.multiple_of(offset, GRANULE), size)
            both(
                (cache_key_hbm, cache_value_hbm),
                (key_buffer, value_buffer),
                sems,
                (layer_ref[0], of_row, pl.ds(group * heads, heads), from_),
                (slot, slice(None), to),
            )

        def scale_piece(offset, size):
            both(
                (key_scale_hbm, value_scale_hbm),
                (key_scale_buffer, value_scale_buffer),
                scale_sems,
                (
                    layer_ref[1],
                    of_row,
                    slice(None),
                    pl.ds(pl.multiple_of(start + offset, LANES), size),
                ),
                (slot, slice(None), pl.ds(pl.multiple_of(offset, LANES), size)),
            )

        def pieces(granule, room, size, copy):
            left = (length_ref[of_row] - start + granule - 1) & -granule
            if size <= room:
                pl.when(left >= size)(lambda: copy(0, size))

            @pl.when(left < size)
            def _():
                for bit in piece_sizes(size, granule):
                    pl.when((left & bit) != 0)(functools.partial(copy, left & -2 * bit, bit))

        pieces(GRANULE, capacity, tiles.tile, piece)
        if quantized:
            lanes = round_up(tiles.tile, LANES)
            pieces(LANES, key_scale_hbm.shape[-1], lanes, scale_piece)

    def fetch_next():
        """Starts the copies of the next tile, of this row or a later one."""
        of_row = at[_ROW]

        @pl.when(of_row < batch)
        def _():
            tile_index = at[_TILE]
            each_copy(of_row, tile_index, at[_STARTED] & (tiles.depth - 1), lambda c: c.start())
            at[_STARTED] += 1
            last = (tile_index + 1) * tiles.tile >= length_ref[of_row]
            at[_TILE] = jnp.where(last, 0, tile_index + 1)

            @pl.when(last)
            def _():
                at[_ROW] = live_ref[of_row + 1]

    def clear(slot, left):
        """Zeros for the values beyond a row's length: they may be anything, and 0 * NaN is NaN."""
        if quantized:  # any int8 is finite

            @pl.when(left < tiles.tile)
            def _():
                scales = value_scale_buffer[slot]
                at_lane = jax.lax.broadcasted_iota(jnp.int32, scales.shape, 1)
                value_scale_buffer[slot] = jnp.where(at_lane < left, scales, 0.0)

            return
        left = jnp.minimum(left, tiles.tile)

        @pl.loop(left >> _GRANULE_BITS, ((left + tiles.unit - 1) & -tiles.unit) >> _GRANULE_BITS)
        def _(i):
            rows = pl.ds(pl.multiple_of(i * GRANULE, GRANULE), GRANULE)
            for head in range(heads):
                values = value_buffer[slot, head, rows].astype(jnp.float32)
                valid = i * GRANULE + jax.lax.broadcasted_iota(jnp.int32, values.shape, 0) < left
                value_buffer[slot, head, rows] = jnp.where(valid, values, 0.0).astype(
                    value_buffer.dtype
                )

    def take(tile_index):
        """Waits for this row's next tile and returns its slot; two tiles before are free now."""
        slot = at[_TAKEN] & (tiles.depth - 1)
        with jax.named_scope("wait"):
            each_copy(row, tile_index, slot, lambda c: c.wait())
        at[_TAKEN] += 1
        fetch_next()
        clear(slot, length - tile_index * tiles.tile)
        return slot

    # --- arithmetic -------------------------------------------------------------------------
    def dot(left, right, contracted):
        return jax.lax.dot_general(
            left.astype(dtype),
            right.astype(dtype),
            (((contracted,), (0,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    def grow(head, columns, raw):
        """Raises the running maximum; returns it and how much the sums so far shrink."""
        before = largest_ref[head, :, columns]
        after = jnp.maximum(before, raw.max(0, keepdims=True) * to_exponent)  # [1, R]
        largest_ref[head, :, columns] = after
        return after, jnp.exp2(before - after)

    def absorb(head, columns, keys, values, seen):
        """Adds keys of which some are not seen; ``seen(shape)`` says which."""
        raw = dot(keys, query_ref[0, head, :, columns], 1)  # [W, R]
        raw = jnp.where(seen(raw.shape), raw, -jnp.inf)
        largest, shrink = grow(head, columns, _fold(raw, jnp.maximum))
        odds = jnp.exp2(raw * to_exponent - largest)
        total_ref[head, :, columns] = total_ref[head, :, columns] * shrink + _fold(odds, jnp.add)
        mixed = dot(values, odds, 0)  # [H, R]
        mixed_ref[head, :, columns] = mixed_ref[head, :, columns] * shrink + mixed

    def each_chunk(do):
        """``do(first, columns)`` for every chunk of the packed queries."""
        if tiles.columns == tiles.chunk:
            do(0, pl.ds(0, tiles.chunk))
        else:

            @pl.loop(0, tiles.columns // tiles.chunk)
            def _(i):
                first = pl.multiple_of(i * tiles.chunk, tiles.chunk)
                do(first, pl.ds(first, tiles.chunk))

    def scale_of(buffer, slot, head, keys):  # [W, R], columns equal
        of_all = buffer[slot, :, keys]  # [K, W]
        mine = jax.lax.broadcasted_iota(jnp.int32, of_all.shape, 0) == group * heads + head
        along_lanes = jnp.where(mine, of_all, 0.0).sum(0, keepdims=True)
        return jnp.broadcast_to(along_lanes, (tiles.chunk, along_lanes.shape[1])).T

    # --- a row ------------------------------------------------------------------------------
    @pl.when(row == 0)
    def _():
        live_ref[batch] = batch

        @pl.loop(0, batch)
        def _(i):
            r = batch - 1 - i
            live_ref[r] = jnp.where(length_ref[r] > 0, r, live_ref[r + 1])

        at[_ROW] = live_ref[0]
        at[_TILE] = at[_STARTED] = at[_TAKEN] = at[_SCORED] = 0

        @pl.loop(0, tiles.depth - 2)
        def _(_):
            fetch_next()

    def add_fresh(first, columns):
        seen_fresh, causal = fresh_ref[row], causal_ref[row] == 1
        width = min(LANES, tiles.fresh)

        def seen(shape, start):
            key_at = start + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
            visible = key_at < seen_fresh
            if block_columns is None:
                return visible
            query_at = first + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
            # The block of a query: a division that floats do exactly, for its .5 is far from whole.
            block = ((query_at.astype(jnp.float32) + 0.5) / block_columns[1]).astype(jnp.int32)
            return visible & (~causal | (key_at < (block + 1) * block_columns[0]))

        def of_head(head):
            largest_ref[head, :, columns] = jnp.full((1, tiles.chunk), _FLOOR, jnp.float32)
            total_ref[head, :, columns] = jnp.zeros((SUBLANES, tiles.chunk), jnp.float32)
            mixed_ref[head, :, columns] = jnp.zeros((head_dim, tiles.chunk), jnp.float32)
            for start in range(0, tiles.fresh, width):
                keys = slice(start, min(start + width, tiles.fresh))
                absorb(
                    head,
                    columns,
                    key_ref[0, head, keys],
                    value_ref[0, head, keys],
                    functools.partial(seen, start=start),
                )

        if tiles.fresh <= width:
            for head in range(heads):  # side by side
                of_head(head)
        else:
            pl.loop(0, heads)(of_head)

    with jax.named_scope("fresh"):
        each_chunk(add_fresh)

    # The cached prefix is a row of units, each some keys of one kv head and a chunk of queries; the
    # heads are counted fastest. A unit is scored while the one before is weighed. All units are
    # masked: the compiler finds room for that, and a rest needs no path of its own.
    unit = tiles.unit
    chunks = tiles.columns // tiles.chunk
    count = (length + tiles.tile - 1) >> (tiles.tile.bit_length() - 1)

    def place_of(chunk, part):
        """The queries and the first key of a unit."""
        columns = pl.ds(pl.multiple_of(chunk * tiles.chunk, tiles.chunk), tiles.chunk)
        return columns, pl.multiple_of(part * unit, unit)

    def score(slot, chunk, head, part, left, place):
        """A unit's scores, into ``score_scratch[place]``; a generator that yields after a piece."""
        columns, first_key = place_of(chunk, part)
        query = query_ref[0, head, :, columns]
        step, raws = min(unit, _TOGETHER), None
        largest = jnp.full((SUBLANES, tiles.chunk), -jnp.inf, jnp.float32)
        key_at = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, tiles.chunk), 0)
        for start in range(0, unit, LANES):
            if raws is None or start % step == 0:
                raws = dot(key_buffer[slot, head, pl.ds(first_key + start, step)], query, 1)
            raw = raws[start % step : start % step + LANES]
            if quantized:
                keys = pl.ds(first_key + start, LANES)
                raw = raw * scale_of(key_scale_buffer, slot, head, keys)
            for at_row in range(0, LANES, SUBLANES):  # register by register: fewer are in use
                seen = key_at < left - first_key - start - at_row
                some = jnp.where(seen, raw[at_row : at_row + SUBLANES], -jnp.inf)
                score_scratch[place, start + at_row : start + at_row + SUBLANES] = some
                largest = jnp.maximum(largest, some)
            yield
        raw_largest_scratch[place] = largest

    def weigh(slot, chunk, head, part, place):
        """Adds a unit that is scored; a generator that yields after a piece."""
        columns, first_key = place_of(chunk, part)
        largest, shrink = grow(head, columns, raw_largest_scratch[place])
        total = total_ref[head, :, columns] * shrink
        for start in range(0, unit, LANES):
            keys = pl.ds(first_key + start, LANES)
            raw = score_scratch[place, start : start + LANES]
            odds = jnp.exp2(raw * to_exponent - largest)
            total = total + _fold(odds, jnp.add)
            if quantized:
                odds = odds * scale_of(value_scale_buffer, slot, head, keys)
            new = dot(value_buffer[slot, head, keys], odds, 0)
            before = mixed_ref[head, :, columns]  # kept in memory: registers are scarce
            mixed_ref[head, :, columns] = (before if start else before * shrink) + new
            yield
        total_ref[head, :, columns] = total

    def add_tiles():
        @pl.when(count > 0)
        def _():
            for _ in score(take(0), 0, 0, 0, length, at[_SCORED] & 1):
                pass

        @pl.loop(0, count)
        def _(tile_index):
            slot = (at[_TAKEN] - 1) & (tiles.depth - 1)
            left = length - tile_index * tiles.tile
            parts = (jnp.minimum(left, tiles.tile) + unit - 1) >> (unit.bit_length() - 1)
            more = tile_index + 1 < count

            @pl.when(more)
            def _():
                take(tile_index + 1)

            # After the last unit of the last tile a dead one is scored.
            next_slot = jnp.where(more, (slot + 1) & (tiles.depth - 1), slot)
            next_left = jnp.where(more, left - tiles.tile, left)

            @pl.loop(0, chunks)
            def _(chunk):
                @pl.loop(0, parts)
                def _(part):
                    # What follows this part: digits of a number, counted up by one.
                    last = part + 1 == parts
                    next_part = jnp.where(last, 0, part + 1)
                    next_chunk = jnp.where(last, chunk + 1, chunk)
                    last = next_chunk == chunks
                    then = (
                        jnp.where(last, next_slot, slot),
                        jnp.where(last, 0, next_chunk),
                        0,
                        next_part,
                        jnp.where(last, next_left, left),
                    )

                    @pl.loop(0, heads)
                    def _(head):
                        place = at[_SCORED] & 1
                        at[_SCORED] += 1
                        over = head + 1 == heads
                        same = slot, chunk, head + 1, part, left
                        after = (jnp.where(over, x, y) for x, y in zip(then, same, strict=True))
                        # The compiler keeps close to the order in which this is written.
                        now = weigh(slot, chunk, head, part, place)
                        ahead = score(*after, place=1 - place)
                        for _ in itertools.zip_longest(now, ahead):
                            pass

    with jax.named_scope("cached"):
        add_tiles()

    def finish(first, columns):
        for head in range(heads):
            total = total_ref[head, :, columns].sum(0, keepdims=True)
            share = 1.0 / jnp.where(total == 0, 1.0, total)  # nothing seen: zeros
            mixed = mixed_ref[head, :, columns]
            out_ref[0, head, :, columns] = (mixed * share).astype(out_ref.dtype)

    each_chunk(finish)
