"""Which tiles of a block-diffusion mask are live: known from lengths alone, before any data.

Everything here is numpy on the host: a ``[T / tile, S / tile]`` table, never the mask itself.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool

Layout = Literal["clean", "noisy", "alone", "joint"]


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The static part of a mask. Queries and keys are halves (``segments``) of L places each.

    ======== ======================== =======================
    layout   queries                  keys
    ======== ======================== =======================
    clean    x_0                      x_0
    noisy    x_t                      x_0 ; x_t
    alone    x_t                      x_t (MDLM)
    joint    x_t ; x_t' ; … ; x_0     x_t ; x_t' ; … ; x_0
    ======== ======================== =======================

    Attributes:
      layout: see above.
      length: L, places of a row.
      block_length: tokens a block; ``None``: a document is one block.
      copies: noisy copies of the joint layout; 1 otherwise.
      aligned: documents start at multiples of ``block_length`` in their row. If not, a few more
        tiles are visited; the result is right either way.

    Raises:
      ValueError: for an unknown layout, or sizes below 1.
    """

    layout: Layout
    length: int
    block_length: int | None
    copies: int = 1
    aligned: bool = True

    def __post_init__(self):
        if self.layout not in get_args(Layout):
            names = ", ".join(get_args(Layout))
            raise ValueError(f"layout = {self.layout!r} is none of {names}")
        for name in ("length", "copies", "block_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value} must be at least 1")
        if self.copies > 1 and self.layout != "joint":
            raise ValueError(
                f"copies = {self.copies} in layout {self.layout!r}: there a copy is a row of its "
                "own; only layout 'joint' holds several"
            )

    @property
    def block(self) -> int:
        """Tokens a block; a row where a document is one block (documents are told apart by id)."""
        return self.length if self.block_length is None else min(self.block_length, self.length)

    @property
    def queries(self) -> tuple[int, ...]:
        """The copy of each segment of queries; 0 is the clean one."""
        noisy = (*range(1, self.copies + 1), 0)
        return {"clean": (0,), "noisy": (1,), "alone": (1,), "joint": noisy}[self.layout]

    @property
    def keys(self) -> tuple[int, ...]:
        """The copy of each segment of keys."""
        return (0, 1) if self.layout == "noisy" else self.queries


def tile_lengths(geometry: Geometry, tile: int) -> tuple[int, int]:
    """How many queries and keys there are once each segment is filled up to whole tiles."""
    padded = -(-geometry.length // tile) * tile
    return len(geometry.queries) * padded, len(geometry.keys) * padded


@functools.lru_cache(maxsize=256)
def live_tiles(geometry: Geometry, query_tile: int, key_tile: int) -> Bool[np.ndarray, "Tq Tk"]:
    """True for the tiles in which some query may see some key, whatever the documents are.

    Args:
      geometry: the mask's; both tiles must divide its length.
      query_tile, key_tile: sizes of a tile.

    Raises:
      ValueError: if a tile does not divide the length.
    """
    length, block = geometry.length, geometry.block
    if length % query_tile or length % key_tile:
        raise ValueError(
            f"tiles of {query_tile} x {key_tile} do not divide length {length}; fill it up first"
        )
    first = np.arange(0, length, query_tile)[:, None]  # of a query tile
    last = first + query_tile - 1
    first_key = np.arange(0, length, key_tile)[None]
    last_key = first_key + key_tile - 1
    if geometry.aligned or geometry.block_length is None or block == length:
        own = (first_key // block <= last // block) & (last_key // block >= first // block)
        before = first_key // block < last // block
        until_own = first_key // block <= last // block
    else:  # a block may start at any of the C places up to the query
        own = (first_key <= last + block - 1) & (last_key >= first - block + 1)
        before = first_key < last
        until_own = first_key <= last + block - 1
    never = np.zeros_like(own)

    def between(query_copy: int, key_copy: int) -> np.ndarray:
        if query_copy == key_copy:
            return until_own if query_copy == 0 else own
        return before if key_copy == 0 else never

    return np.block([[between(q, k) for k in geometry.keys] for q in geometry.queries])


def visible_pairs(geometry: Geometry) -> int:
    """Pairs of a query and a key that it sees, in a row that is one document."""
    length, block = geometry.length, geometry.block
    place = np.arange(length)
    start = place // block * block
    size = np.minimum(start + block, length) - start
    own, before = int(size.sum()), int(start.sum())
    pairs = {"clean": own + before, "noisy": own + before, "alone": own}
    if geometry.layout == "joint":
        return (geometry.copies + 1) * (own + before)
    return pairs[geometry.layout]


def tile_counts(geometry: Geometry, query_tile: int, key_tile: int) -> tuple[int, float]:
    """``(visited, ideal)``: tiles that are computed, and visible pairs over the tile's area."""
    live = live_tiles(geometry, query_tile, key_tile)
    return int(live.sum()), visible_pairs(geometry) / (query_tile * key_tile)
