"""One line of the report: a kernel and its stock alternative on the same work, on one chip."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pallas_kernels.chips import CHIPS

# The most that a kernel may move, over the least possible.
BYTES_TARGET = {"block_decode_attention": 1.1, "confidence_head": 1.05, "expert_mlp": 1.1}
TILES_TARGET = 1.15  # visited over ideal tiles of training attention


@dataclasses.dataclass(frozen=True)
class Entry:
    """All figures are the compiler's or arithmetic; nothing here was run.

    Attributes:
      kernel, chip, shape: what was compiled for what, on which work.
      bundles: of one call on one core: static bundles times trips of each loop.
      mxu_occupancy: share of the MXU slots used in the loop that computes.
      spill_slots: vector registers stored to and loaded from the stack in that loop.
      hbm_bytes: moved, from the kernel's block index maps and copies.
      hbm_bytes_least: what any implementation must move.
      loops: static bundles of each loop, without those inside, and its trips.
      other_spill_slots: spills outside of the loop that computes.
      stock: the alternative's name; its figures follow, from the same run.
      stock_bundles: as ``bundles``; over all fusions of an XLA program.
      stock_cycles: XLA's own estimate, waits for memory included; 0 for a Pallas kernel.
      stock_mxu_occupancy, stock_spill_slots, stock_hbm_bytes: of the alternative.
      visited_tiles, ideal_tiles: of an attention mask; the ideal is its area in tiles.
      note: what a reader must know.
    """

    kernel: str
    chip: str
    shape: str
    bundles: int
    mxu_occupancy: float
    spill_slots: int
    hbm_bytes: int
    hbm_bytes_least: int
    loops: tuple[tuple[int, float], ...]
    other_spill_slots: int
    stock: str
    stock_bundles: int
    stock_cycles: int
    stock_mxu_occupancy: float
    stock_spill_slots: int
    stock_hbm_bytes: int
    visited_tiles: int | None = None
    ideal_tiles: float | None = None
    note: str = ""

    @property
    def bytes_ratio(self) -> float:
        """Bytes moved over the least possible."""
        return self.hbm_bytes / self.hbm_bytes_least

    @property
    def bundles_ratio(self) -> float:
        """Our bundles over those of the stock alternative."""
        return self.bundles / self.stock_bundles

    def dma_bundles(self, stock: bool = False) -> float:
        """Bundles that one core could issue while the bytes move at the chip's full bandwidth."""
        chip = CHIPS[self.chip]
        moved = self.stock_hbm_bytes if stock else self.hbm_bytes
        return moved / chip.bandwidth * chip.clock_hz

    def bound_bundles(self, stock: bool = False) -> float:
        """The larger of what is issued and what the bytes take: at best both overlap fully."""
        issued = self.stock_bundles if stock else self.bundles
        return max(issued, self.dma_bundles(stock))

    def misses(self) -> list[str]:
        """The targets that are not met, in words."""
        missed = []
        target = BYTES_TARGET.get(self.kernel)
        if target is not None and self.bytes_ratio > target:
            missed.append(f"{self.bytes_ratio:.2f} x the least bytes, target {target}")
        if self.visited_tiles is not None and self.ideal_tiles:
            ratio = self.visited_tiles / self.ideal_tiles
            if ratio > TILES_TARGET:
                missed.append(f"{ratio:.2f} x the ideal tiles, target {TILES_TARGET}")
        if self.spill_slots:
            missed.append(f"{self.spill_slots} spill slots in the inner loop")
        if self.bundles_ratio > 1:
            missed.append(f"{self.bundles_ratio:.2f} x the stock bundles")
        return missed

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the attributes and what is derived from them."""
        derived = {
            "dma_bundles": self.dma_bundles(),
            "stock_dma_bundles": self.dma_bundles(stock=True),
            "misses": self.misses(),
        }
        return dataclasses.asdict(self) | derived

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Entry:
        """The inverse of ``as_dict``."""
        names = {field.name for field in dataclasses.fields(cls)}
        kept: dict[str, Any] = {k: v for k, v in values.items() if k in names}
        kept["loops"] = tuple((int(bundles), float(trips)) for bundles, trips in kept["loops"])
        return cls(**kept)
