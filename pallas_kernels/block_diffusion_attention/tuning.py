"""Which tile sizes: a table by chip, layout and length, made by ``tune``; a rule for the rest."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

from pallas_kernels.block_diffusion_attention.geometry import Geometry, tile_counts
from pallas_kernels.block_diffusion_attention.kernel import Tiles
from pallas_kernels.chips import chip_here

TABLE = Path(__file__).with_name("tuning.json")
SIZES = (128, 256, 512)  # 1024 spills thousands of registers and saves a tenth of the bundles
# Visited over ideal tiles that we aim at. By the compiler's bundles larger tiles would be faster:
# at 4096 tokens 512 needs two thirds of the bundles of 256 at 1.24 to 1.36 times the ideal.
WASTE = 1.15
MOST_TILES = 1 << 18  # of queries x keys: half of them live, three bytes each in scalar memory


def tiles_for(geometry: Geometry, chip: str | None = None) -> Tiles:
    """Tile sizes for a mask.

    Args:
      geometry: the mask's.
      chip: a key of ``CHIPS``; the one at hand by default.
    """
    if chip is None:
        here = chip_here()
        chip = here and here.name
    length = max(128, 1 << (geometry.length - 1).bit_length())  # as in the table: rounded up
    found = _table().get(f"{chip}/{geometry.layout}/{length}")
    sizes = good_sizes(geometry)
    if found is None or any(size not in sizes for size in found):
        return Tiles.square(max(sizes))
    forward, dkv, dq = found
    return Tiles((forward, forward), forward, (dkv, dkv), dkv, (dq, dq))


def good_sizes(geometry: Geometry) -> list[int]:
    """Square tiles that waste no more than ``WASTE``, or else the least wasteful one."""
    waste = {size: _waste(geometry, size) for size in allowed_sizes(geometry)}
    good = [size for size in waste if waste[size] <= WASTE]
    return good or [min(waste, key=lambda size: waste[size])]


def allowed_sizes(geometry: Geometry) -> list[int]:
    """Sizes that fill a row up by less than an eighth, and whose tables fit."""
    length = geometry.length

    def fits(size: int) -> bool:
        count = -(-length // size)
        area = count * len(geometry.queries) * count * len(geometry.keys)
        return count * size <= max(128, length * 9 // 8) and area <= MOST_TILES

    return [size for size in SIZES if fits(size)] or [128 if length < 1024 else 512]


def xla_tile(geometry: Geometry) -> int:
    """Tile size of the XLA path: the whole row where it is short.

    Measured on two CPU cores at 256 and 512 places; larger ones are for a GPU's sake.
    """
    limit = 64 if geometry.length <= 256 else 128 if geometry.length <= 2048 else 256
    return min(geometry.length, limit)


def _waste(geometry: Geometry, size: int) -> float:
    """Visited over ideal tiles; a noisy pass is taken together with the clean one it belongs to."""
    length = -(-geometry.length // size) * size
    passes = ("clean", "noisy") if geometry.layout == "noisy" else (geometry.layout,)
    counts = [
        tile_counts(dataclasses.replace(geometry, layout=name, length=length), size, size)
        for name in passes
    ]
    return sum(visited for visited, _ in counts) / sum(ideal for _, ideal in counts)


@functools.cache
def _table() -> dict[str, list[int]]:
    return json.loads(TABLE.read_text())["tiles"] if TABLE.exists() else {}
