"""Tile sizes of the decode attention kernel."""

from __future__ import annotations

import dataclasses

LANES, SUBLANES = 128, 8  # of a float32 register
GRANULE = 32  # cached positions that a copy is rounded up to: the rows of an int8 tile
_TILE = 1024  # cached positions of a full tile
_UNIT = 512  # positions scored and weighed at a time: more do not fit into the registers
_DEPTH = 4  # tiles in flight; a power of two
_BUDGET = 48 << 20  # VMEM bytes, of 64 MiB on the smallest chips


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Sizes of the kernel.

    Attributes:
      tile: cached positions read at a time, a power of two and at least 128.
      unit: cached positions scored and weighed at a time, divides ``tile``.
      depth: tiles in flight, a power of two.
      chunk: packed queries multiplied at a time.
      columns: packed queries, rounded up to whole chunks.
      fresh: fresh tokens, rounded up.
      heads: kv heads of a grid step.
      vmem: bytes needed.
    """

    tile: int
    unit: int
    depth: int
    chunk: int
    columns: int
    fresh: int
    heads: int
    vmem: int

    def copies(self, length: int, start: int, capacity: int) -> list[tuple[int, int]]:
        """The pieces ``(offset, size)`` that a tile is fetched in: the kernel's plan, in Python.

        Args:
          length: valid cached positions of the row.
          start: the tile's first position, less than ``length``.
          capacity: S of the cache, a multiple of 32.
        """
        left = min(self.tile, round_up(length, GRANULE) - start)
        if left == self.tile <= capacity:
            return [(0, self.tile)]
        bits = piece_sizes(self.tile, GRANULE)
        return [(left & ~(2 * bit - 1), bit) for bit in bits if left & bit]


def round_up(n: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is not below ``n``."""
    return -(-n // multiple) * multiple


def piece_sizes(tile: int, granule: int) -> list[int]:
    """Halves, quarters … of a tile down to ``granule``: any rest is a sum of some of them."""
    sizes = []
    while tile > granule:
        tile //= 2
        sizes.append(tile)
    return sizes


def tiling(
    query: tuple[int, int, int, int],
    kv_heads: int,
    capacity: int,
    itemsize: int,
    cache_itemsize: int,
    cores: int = 1,
) -> Tiling:
    """Chooses sizes that fit into VMEM.

    Args:
      query: B, T, N, H.
      kv_heads: K.
      capacity: S.
      itemsize: bytes of a query number.
      cache_itemsize: bytes of a cached number.
      cores: tensor cores of a device; halves of the kv heads are shared out.

    Raises:
      ValueError: if one kv head alone does not fit.
    """
    _, length, query_heads, head_dim = query
    columns = round_up(length * (query_heads // kv_heads), LANES)
    fresh = round_up(length, 4 * SUBLANES // itemsize)
    tile = _TILE
    while tile // 2 >= max(capacity, LANES):
        tile //= 2
    # float32 products and the scales of an int8 cache take registers of their own.
    unit = min(tile, _UNIT if itemsize == cache_itemsize == 2 else _UNIT // 2)
    width = round_up(head_dim, LANES)
    outer = cores if kv_heads % cores == 0 else 1
    for heads in range(kv_heads // outer, 0, -1):
        if (kv_heads // outer) % heads:
            continue
        blocks = 2 * heads * width * itemsize * 2 * (columns + fresh)  # two buffers each
        buffers = 2 * _DEPTH * heads * tile * width * cache_itemsize
        scales = 2 * _DEPTH * max(8, kv_heads) * tile * 4
        scratch = 2 * LANES * unit * 4
        state = heads * columns * (2 * SUBLANES + width) * 4
        vmem = blocks + buffers + scales + scratch + state
        if vmem <= _BUDGET:
            return Tiling(
                tile,
                unit,
                _DEPTH,
                LANES,
                columns,
                fresh,
                heads,
                vmem,
            )
    raise ValueError(
        f"{length} fresh tokens of {query_heads // kv_heads} query heads a kv head do not fit into "
        f"the kernel's memory; use fewer tokens or implementation='xla'"
    )
