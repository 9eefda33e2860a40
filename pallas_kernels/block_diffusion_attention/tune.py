"""Writes ``tuning.json``: for each chip, layout and length the tiles with the least bundles.

A live tile costs the bundles of the kernel's grid loop, whatever the length and the layout are, so
each tile size is compiled once a chip. A dead step of the grid costs ``DEAD`` (an estimate: the
branch around the tile, and the pipeline's bookkeeping).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp

from pallas_kernels import schedule
from pallas_kernels.block_diffusion_attention.geometry import (
    Geometry,
    Layout,
    live_tiles,
)
from pallas_kernels.block_diffusion_attention.kernel import Tiles, splash_attention, tile_table
from pallas_kernels.block_diffusion_attention.mask import BlockDiffusionMask
from pallas_kernels.block_diffusion_attention.tuning import SIZES, TABLE, good_sizes

DEAD = 100
BLOCK = 32  # tokens a block, where a document is not one block
LENGTHS = tuple(128 << i for i in range(11))  # up to 131072
_KERNELS = {
    "forward": "splash_mha_fwd_segmented_residuals",
    "dkv": "splash_mha_dkv_segmented_no_residuals",
    "dq": "splash_mha_dq_segmented_no_residuals",
}


def program(size: int, length: int = 2048) -> tuple[Any, tuple[Any, ...]]:
    """Forward and backward with one tile size, of mini's shape, for ``schedule.measure``."""
    geometry = Geometry("noisy", length, BLOCK)
    query = jax.ShapeDtypeStruct((1, length, 16, 128), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((1, 4, len(geometry.keys) * length, 128), jnp.bfloat16)
    place = jax.ShapeDtypeStruct((1, length), jnp.int32)
    mask = BlockDiffusionMask(place, place, "noisy", BLOCK, aligned=True)

    def gradients(q: Any, k: Any, v: Any, mask: BlockDiffusionMask) -> Any:
        def total(q: Any, k: Any, v: Any) -> Any:
            mixed = splash_attention(q, k, v, mask, Tiles.square(size))
            return mixed.astype(jnp.float32).sum()

        return jax.grad(total, (0, 1, 2))(q, k, v)

    return gradients, (query, key, key, mask)


def bundles(chip: str, size: int) -> dict[str, dict[str, int]]:
    """Bundles of the grid loop, MXU slots in use and spilled slots, by kernel."""
    found = {s.name.rsplit(".", 1)[0]: s for s in schedule.measure(chip, program, size)}
    return {
        name: {
            "bundles": found[full].inner.bundles,
            "mxu": found[full].inner.used[schedule.MXU],
            "spills": found[full].inner.spill_slots,
        }
        for name, full in _KERNELS.items()
    }


def cost(geometry: Geometry, size: int, per_tile: int, by_key: bool) -> int:
    """Bundles of one head's kernel over a whole row."""
    live = live_tiles(geometry, size, size)
    steps = tile_table(live, by_key)[1].size
    visited = int(live.sum())
    return visited * per_tile + (steps - visited) * DEAD


def tune(chips: Sequence[str]) -> None:
    """Compiles every tile size for ``chips`` and rewrites the table, chip by chip."""
    measured: dict[str, Any] = json.loads(TABLE.read_text())["measured"] if TABLE.exists() else {}
    for chip in chips:
        measured[chip] = {}
        for size in SIZES:
            try:
                measured[chip][str(size)] = bundles(chip, size)
            except RuntimeError as error:  # does not fit the chip's memory
                print(f"{chip} {size}: left out, {str(error)[-300:]}", file=sys.stderr)
                continue
            print(f"{chip} {size}: {measured[chip][str(size)]}", flush=True)
        write(measured)


def write(measured: dict[str, Any]) -> None:
    """Chooses tiles by what was measured, and writes the table."""
    tiles: dict[str, list[int]] = {}
    for chip, sizes in measured.items():
        for layout in get_args(Layout):
            for length in LENGTHS:
                block = None if layout == "alone" or length <= BLOCK else BLOCK
                geometry = Geometry(layout, length, block)
                tiles[f"{chip}/{layout}/{length}"] = [
                    _best(
                        geometry, {int(s): found[name]["bundles"] for s, found in sizes.items()}, by
                    )
                    for name, by in (("forward", False), ("dkv", True), ("dq", False))
                ]
    table = {
        "about": "tiles: chip/layout/length (rounded up to a power of two): the sides of the "
        "square tiles of the forward, dkv and dq kernels, of those that visit at most 1.15 times "
        "the ideal tiles (or the least) the ones with the least bundles. measured: chip: tile "
        "size: kernel: bundles, MXU slots and spilled slots of the grid loop, one live tile.",
        "command": "python -m pallas_kernels.tune block_diffusion_attention",
        "jax": jax.__version__,
        "measured": measured,
        "tiles": tiles,
    }
    TABLE.write_text(_text(table))


def _best(geometry: Geometry, per_tile: dict[int, int], by_key: bool) -> int:
    """The cheapest size among those that do not waste tiles."""
    sizes = [s for s in good_sizes(geometry) if s in per_tile] or [min(per_tile)]
    return min(sizes, key=lambda size: cost(geometry, size, per_tile[size], by_key))


def _text(table: dict[str, Any]) -> str:
    """JSON with one entry of ``tiles`` a line."""
    text = json.dumps({k: v for k, v in table.items() if k != "tiles"}, indent=1)
    lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in table["tiles"].items())
    return text.removesuffix("\n}") + ',\n "tiles": {\n' + lines + "\n }\n}\n"
