"""Attention of a few fresh tokens a row over that row's cached prefix."""

from pallas_kernels.block_decode_attention.api import block_decode_attention
from pallas_kernels.block_decode_attention.reference import reference
from pallas_kernels.block_decode_attention.traffic import least_bytes, traffic

__all__ = ["block_decode_attention", "least_bytes", "reference", "traffic"]
