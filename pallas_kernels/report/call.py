"""One call of a kernel of a decode step, for some rows and weights: no stock beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pallas_kernels.chips import CHIPS


@dataclasses.dataclass(frozen=True)
class Call:
    """Compiler figures and counted bytes; nothing here was run.

    Attributes:
      kernel, chip, model: what was compiled for what, in which sizes.
      rows: blocks decoded together.
      weights: ``"bfloat16"`` or a scheme.
      bundles: of one call on one core: static bundles times trips of each loop.
      mxu_occupancy: share of the MXU slots used in the loop that computes.
      spill_slots: vector registers stored to and loaded from the stack in that loop.
      hbm_bytes: moved, from the kernel's block index maps and copies.
      hbm_bytes_least: what any implementation must move.
      experts: touched ones, of the expert MLP.
      cache_length: valid positions a row, of attention.
    """

    kernel: str
    chip: str
    model: str
    rows: int
    weights: str
    bundles: int
    mxu_occupancy: float
    spill_slots: int
    hbm_bytes: int
    hbm_bytes_least: int
    experts: int | None = None
    cache_length: int | None = None

    def dma_bundles(self) -> float:
        """Bundles that one core could issue while the bytes move at the chip's full bandwidth."""
        chip = CHIPS[self.chip]
        return self.hbm_bytes / chip.bandwidth * chip.clock_hz

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the attributes that are set, and ``dma_bundles``."""
        found = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        return found | {"dma_bundles": round(self.dma_bundles())}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Call:
        """The inverse of ``as_dict``."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{k: v for k, v in values.items() if k in names})
