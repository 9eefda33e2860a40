"""Kernels and mask predicates for block diffusion; knows nothing of ``llada_jax``."""

from pallas_kernels.dispatch import Implementation, check_implementation
from pallas_kernels.mask import (
    WindowMask,
    block_causal,
    block_diffusion,
    block_diffusion_packed,
)

__all__ = [
    "Implementation",
    "WindowMask",
    "block_causal",
    "block_diffusion",
    "block_diffusion_packed",
    "check_implementation",
]
