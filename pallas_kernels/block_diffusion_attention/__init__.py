"""Attention of block-diffusion training, under masks that are never materialised."""

from pallas_kernels.block_diffusion_attention.api import block_diffusion_attention
from pallas_kernels.block_diffusion_attention.geometry import (
    Geometry,
    Layout,
    live_tiles,
    tile_counts,
    visible_pairs,
)
from pallas_kernels.block_diffusion_attention.kernel import Tiles
from pallas_kernels.block_diffusion_attention.mask import BlockDiffusionMask
from pallas_kernels.block_diffusion_attention.reference import reference

__all__ = [
    "BlockDiffusionMask",
    "Geometry",
    "Layout",
    "Tiles",
    "block_diffusion_attention",
    "live_tiles",
    "reference",
    "tile_counts",
    "visible_pairs",
]
