"""Decode attention in plain XLA, for CPUs and GPUs: the prefix is read in pieces."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from pallas_kernels.mask import WindowMask

_PIECE = 128  # cached positions read at a time


def decode_attention_xla(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K T H"],
    value: Float[Array, "B K T H"],
    cache_keys: Num[Array, "layers B K S H"],
    cache_values: Num[Array, "layers B K S H"],
    cache_length: Int[Array, " B"],
    layer: Int[Array, ""] | int,
    fresh_length: Int[Array, " B"] | None,
    causal: Bool[Array, " B"] | None,
    cache_scales: tuple[Array, Array] | None,
    *,
    block_length: int | None = None,
) -> Float[Array, "B T N H"]:
    """The prefix is read where it lies, up to the longest row's length; no gradient.

    Arguments as ``block_decode_attention``. The fresh keys come first, then the pieces in order.
    """
    batch, kv_heads, length, head_dim = key.shape
    precision = jax.lax.Precision.HIGHEST if query.dtype == jnp.float32 else None
    # [B, K, G T, H]: all queries that share a key head form one matrix.
    packed = query.reshape(batch, length, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    groups = packed.shape[2]
    packed = packed.reshape(batch, kv_heads, groups * length, head_dim)

    def scores(keys: Array) -> Array:  # [B, K, G T, keys]
        raw = jnp.einsum(
            "bkqh,bksh->bkqs",
            packed,
            keys,
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        return raw * head_dim**-0.5

    def mix(odds: Array, values: Array) -> Array:  # [B, K, G T, H]
        return jnp.einsum(
            "bkqs,bksh->bkqh",
            odds.astype(values.dtype),
            values,
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    masked = fresh_length is not None or causal is not None
    fresh = scores(key)
    if masked:
        seen = WindowMask(fresh_length, causal, block_length).dense(length)
        fresh = jnp.where(jnp.tile(seen[:, None], (1, 1, groups, 1)), fresh, -jnp.inf)
    largest = fresh.max(-1, keepdims=True)
    if masked:  # finite where nothing is seen
        largest = jnp.maximum(largest, jnp.finfo(jnp.float32).min)
    odds = jnp.exp(fresh - largest)
    total, mixed = odds.sum(-1, keepdims=True), mix(odds, value)
    piece = math.gcd(cache_keys.shape[3], _PIECE)

    def take(memory: Array, start: Array) -> Array:  # [B, K, piece, H] or [B, K, piece]
        at = (layer, 0, 0, start, 0)[: memory.ndim]
        size = (1, batch, kv_heads, piece, head_dim)[: memory.ndim]
        return jax.lax.dynamic_slice(memory, at, size)[0]

    def add_piece(i: Array, carry: tuple[Array, Array, Array]):
        largest, total, mixed = carry
        start = i * piece
        valid = (start + jnp.arange(piece) < cache_length[:, None])[:, None, None]  # [B,1,1,piece]
        old = scores(take(cache_keys, start).astype(query.dtype))
        values = take(cache_values, start).astype(query.dtype)
        # What lies beyond a row's length may be anything, and 0 * NaN is NaN.
        values = jnp.where(valid.swapaxes(2, 3), values, 0)
        if cache_scales is not None:
            old = old * take(cache_scales[0], start)[:, :, None]
        old = jnp.where(valid, old, -jnp.inf)
        new_largest = jnp.maximum(largest, old.max(-1, keepdims=True))
        shrink, odds = jnp.exp(largest - new_largest), jnp.exp(old - new_largest)
        total = total * shrink + odds.sum(-1, keepdims=True)
        if cache_scales is not None:
            value_scale = take(cache_scales[1], start)[:, :, None]
            odds = odds * jnp.where(valid, value_scale, 0)
        return new_largest, total, mixed * shrink + mix(odds, values)

    pieces = (cache_length.max() + piece - 1) // piece
    _, total, mixed = jax.lax.fori_loop(0, pieces, add_piece, (largest, total, mixed))
    if masked:
        total = jnp.where(total == 0, 1, total)
    out = (mixed / total).reshape(batch, kv_heads, groups, length, head_dim)
    return out.transpose(0, 3, 1, 2, 4).reshape(query.shape).astype(query.dtype)
