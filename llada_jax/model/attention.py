"""Grouped-query attention with query/key norm, partial rotary, and an optional cached prefix."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llada_jax.config import ModelConfig
from llada_jax.model.cache import KVCache
from llada_jax.model.layers import contract, precision_of, rms_norm
from llada_jax.model.rotary import apply_rotary
from pallas_kernels import WindowMask

_PIECE = 128  # cached positions read at a time


def project_qkv(
    x: Float[Array, "B T D"],
    weights: dict[str, Any],
    cos: Float[Array, "B T R"],
    sin: Float[Array, "B T R"],
    config: ModelConfig,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B K T H"], Float[Array, "B K T H"]]:
    """Queries, keys and values; the norm over a whole head comes before the rotation."""

    def project(name: str) -> Array:
        projected = contract("btd,dnh->btnh", x, weights[name]["kernel"], h=config.head_dim)
        if "bias" in weights[name]:
            projected = projected + weights[name]["bias"].astype(projected.dtype)
        return projected

    query = rms_norm(project("query"), weights["query_norm"]["scale"], config.rms_norm_eps)
    key = rms_norm(project("key"), weights["key_norm"]["scale"], config.rms_norm_eps)
    key = apply_rotary(key, cos, sin)
    return apply_rotary(query, cos, sin), key.swapaxes(1, 2), project("value").swapaxes(1, 2)


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    mask: Bool[Array, "#B T S"] | WindowMask | None = None,
    cache: KVCache | None = None,
    cache_length: Int[Array, " B"] | None = None,
    layer: Int[Array, ""] | int = 0,
) -> Float[Array, "B T N H"]:
    """Softmax attention of fresh queries over the keys given and a cached prefix.

    The prefix is read where it lies, in pieces up to the longest row's length: what a canvas has
    beyond costs nothing. With a cache there is no gradient.

    Args:
      query: the fresh tokens; each of the K key heads serves ``N / K`` of the N query heads.
      key, value: the fresh tokens', and a context's before them where there is one.
      mask: which keys a fresh query sees (at least one each); all of them by default.
      cache: earlier tokens, seen by every query.
      cache_length: how many cached positions of each row are valid; needed with ``cache``.
      layer: which layer of the cache to read.

    Returns:
      The mixed values in ``query``'s dtype; scores and softmax are float32.
    """
    batch, kv_heads, _, head_dim = key.shape
    length = query.shape[1]
    if isinstance(mask, WindowMask):
        mask = mask.dense(length)
    precision = precision_of(query.dtype)
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

    fresh = scores(key)
    if mask is not None:
        tiled = jnp.tile(mask[:, None], (1, 1, groups, 1))  # [B, 1, G T, T]
        fresh = jnp.where(tiled, fresh, -jnp.inf)
    largest = jax.lax.stop_gradient(fresh.max(-1, keepdims=True))
    odds = jnp.exp(fresh - largest)
    total, mixed = odds.sum(-1, keepdims=True), mix(odds, value)
    if cache is not None and cache_length is not None:
        piece = math.gcd(cache.keys.shape[3], _PIECE)

        def take(memory: Array, start: Array) -> Array:  # [B, K, piece, H]
            size = (1, batch, kv_heads, piece, head_dim)
            return jax.lax.dynamic_slice(memory, (layer, 0, 0, start, 0), size)[0]

        def add_piece(i: Array, carry: tuple[Array, Array, Array]):
            largest, total, mixed = carry
            start = i * piece
            valid = start + jnp.arange(piece) < cache_length[:, None]  # [B, piece]
            old = jnp.where(valid[:, None, None], scores(take(cache.keys, start)), -jnp.inf)
            new_largest = jnp.maximum(largest, old.max(-1, keepdims=True))
            shrink, odds = jnp.exp(largest - new_largest), jnp.exp(old - new_largest)
            total = total * shrink + odds.sum(-1, keepdims=True)
            return new_largest, total, mixed * shrink + mix(odds, take(cache.values, start))

        pieces = (cache_length.max() + piece - 1) // piece
        _, total, mixed = jax.lax.fori_loop(0, pieces, add_piece, (largest, total, mixed))
    out = (mixed / total).reshape(batch, kv_heads, groups, length, head_dim)
    return out.transpose(0, 3, 1, 2, 4).reshape(query.shape).astype(query.dtype)


def project_out(mixed: Float[Array, "B T N H"], weights: dict[str, Any]) -> Float[Array, "B T D"]:
    """The output projection, with its bias where the configuration asks for one."""
    out = contract("btnh,nhd->btd", mixed, weights["kernel"])
    if "bias" in weights:
        out = out + weights["bias"].astype(out.dtype)
    return out
