"""The obvious implementation, for tests: a dense mask and a softmax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.block_diffusion_attention.mask import BlockDiffusionMask


def reference(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    mask: BlockDiffusionMask,
) -> Float[Array, "B T N H"]:
    """As ``block_diffusion_attention``, with ``[B, N, T, S]`` scores in memory."""
    groups = query.shape[2] // key.shape[1]
    key, value = (jnp.repeat(x.astype(jnp.float32), groups, axis=1) for x in (key, value))
    scores = jnp.einsum("btnh,bnsh->bnts", query.astype(jnp.float32), key, precision="highest")
    scores = scores * query.shape[-1] ** -0.5
    odds = jax.nn.softmax(jnp.where(mask.dense()[:, None], scores, -jnp.inf))
    mixed = jnp.einsum("bnts,bnsh->btnh", odds, value, precision="highest")
    return mixed.astype(query.dtype)
