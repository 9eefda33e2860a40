"""The dense oracle of decode attention, for tests."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from pallas_kernels.mask import block_causal


def reference(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K T H"],
    value: Float[Array, "B K T H"],
    cache_keys: Num[Array, "layers B K S H"],
    cache_values: Num[Array, "layers B K S H"],
    cache_length: Int[Array, " B"],
    layer: Int[Array, ""] | int = 0,
    *,
    fresh_length: Int[Array, " B"] | None = None,
    causal: Bool[Array, " B"] | None = None,
    block_length: int | None = None,
    cache_scales: tuple[Array, Array] | None = None,
) -> Float[Array, "B T N H"]:
    """``block_decode_attention`` with the whole score matrix; the same arguments.

    A query that sees nothing yields zeros.
    """
    batch, length, heads, head_dim = query.shape
    capacity, groups = cache_keys.shape[3], heads // key.shape[1]
    memory = [c[layer].astype(jnp.float32) for c in (cache_keys, cache_values)]
    if cache_scales is not None:
        memory = [m * s[layer][..., None] for m, s in zip(memory, cache_scales, strict=True)]
    old = jnp.arange(capacity) < cache_length[:, None]  # [B, S]
    memory = [jnp.where(old[:, None, :, None], m, 0) for m in memory]
    keys, values = (
        jnp.repeat(jnp.concatenate([m, f.astype(jnp.float32)], axis=2), groups, axis=1)
        for m, f in zip(memory, (key, value), strict=True)
    )  # [B, N, S + T, H]

    place = jnp.arange(length)
    fresh = jnp.ones((batch, length, length), bool)
    if fresh_length is not None:
        fresh &= place < fresh_length[:, None, None]
    if causal is not None and block_length is not None:
        earlier = block_causal(place[:, None], place[None, :], block_length)
        fresh &= ~causal[:, None, None] | earlier
    seen = jnp.concatenate(
        [jnp.broadcast_to(old[:, None], (batch, length, capacity)), fresh], axis=2
    )[:, None]  # [B, 1, T, S + T]

    scores = jnp.einsum("btnh,bnsh->bnts", query.astype(jnp.float32), keys, precision="highest")
    scores = jnp.where(seen, scores * head_dim**-0.5, -jnp.inf)
    largest = scores.max(-1, keepdims=True)
    odds = jnp.exp(scores - jnp.where(jnp.isfinite(largest), largest, 0))
    total = odds.sum(-1, keepdims=True)
    odds = odds / jnp.where(total == 0, 1, total)
    return jnp.einsum("bnts,bnsh->btnh", odds, values, precision="highest").astype(query.dtype)
