"""How many bytes the decode attention kernel moves between HBM and the core, and the least."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.block_decode_attention.tuning import GRANULE, LANES, round_up, tiling


def traffic(
    query: tuple[int, int, int, int],
    kv_heads: int,
    capacity: int,
    lengths: Sequence[int],
    dtype: DTypeLike = jnp.bfloat16,
    cache_dtype: DTypeLike = jnp.bfloat16,
    cores: int = 1,
) -> int:
    """Bytes fetched and written by one call of the kernel: its plan, walked through in Python.

    Args:
      query: B, T, N, H.
      kv_heads: K.
      capacity: S.
      lengths: valid cached positions of each row.
      dtype: of queries and fresh keys.
      cache_dtype: of the cache; int8 has float32 scales.
      cores: tensor cores of a device.
    """
    size, cached = jnp.dtype(dtype).itemsize, jnp.dtype(cache_dtype).itemsize
    capacity = round_up(capacity, GRANULE)
    tiles = tiling(query, kv_heads, capacity, size, cached, cores)
    head_dim, moved = query[3], 0
    for _ in range(kv_heads // tiles.heads):  # the grid: groups of kv heads, then rows
        for length in lengths:
            # Queries and result, fresh keys and values: a block of its own for every step.
            moved += 2 * tiles.heads * head_dim * size * (tiles.columns + tiles.fresh)
            for start in range(0, length, tiles.tile):
                positions = sum(n for _, n in tiles.copies(length, start, capacity))
                moved += 2 * tiles.heads * positions * head_dim * cached
                if cached == 1:  # the scales of all kv heads, in whole registers
                    whole = max(tiles.tile, LANES)
                    moved += 2 * kv_heads * 4 * min(whole, round_up(length - start, LANES))
    return moved


def least_bytes(
    query: tuple[int, int, int, int],
    kv_heads: int,
    lengths: Sequence[int],
    dtype: DTypeLike = jnp.bfloat16,
    cache_dtype: DTypeLike = jnp.bfloat16,
) -> int:
    """The least bytes: queries, result, fresh keys and values, and the valid part of the cache.

    Arguments as ``traffic``.
    """
    batch, length, heads, head_dim = query
    size, cached = jnp.dtype(dtype).itemsize, jnp.dtype(cache_dtype).itemsize
    fresh = 2 * batch * length * (heads + kv_heads) * head_dim * size
    position = head_dim * cached + (4 if cached == 1 else 0)
    return fresh + 2 * sum(lengths) * kv_heads * position
