"""Kernels and mask predicates for block diffusion; knows nothing of ``llada_jax``."""

from pallas_kernels.mask import block_causal, block_diffusion, block_diffusion_packed

__all__ = ["block_causal", "block_diffusion", "block_diffusion_packed"]
