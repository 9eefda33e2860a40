"""Grouped-query attention with query/key norm, partial rotary, and an optional cached prefix."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llada_jax.config import ModelConfig
from llada_jax.model.layers import contract, precision_of, rms_norm
from llada_jax.model.rotary import apply_rotary


def project_qkv(
    x: Float[Array, "B T D"],
    weights: dict[str, Any],
    cos: Float[Array, "B T R"],
    sin: Float[Array, "B T R"],
    config: ModelConfig,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B K T H"], Float[Array, "B K T H"]]:
    """Queries, keys and values; the norm over a whole head comes before the rotation."""

    def project(name: str) -> Array:
        projected = contract("btd,dnh->btnh", x, weights[name]["kernel"])
        if "bias" in weights[name]:
            projected = projected + weights[name]["bias"].astype(projected.dtype)
        return projected

    query = rms_norm(project("query"), weights["query_norm"]["scale"], config.rms_norm_eps)
    key = rms_norm(project("key"), weights["key_norm"]["scale"], config.rms_norm_eps)
    key = apply_rotary(key, cos, sin)
    return apply_rotary(query, cos, sin), key.swapaxes(1, 2), project("value").swapaxes(1, 2)


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K T H"],
    value: Float[Array, "B K T H"],
    mask: Bool[Array, "#B T T"] | None = None,
    cached_key: Float[Array, "B K S H"] | None = None,
    cached_value: Float[Array, "B K S H"] | None = None,
    cache_length: Int[Array, " B"] | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention of fresh queries over fresh keys and a cached prefix.

    Args:
      query, key, value: the fresh tokens; each of the K heads serves ``N / K`` query heads.
      mask: which fresh keys a fresh query sees (at least one each); all of them by default.
      cached_key, cached_value: earlier tokens, seen by every query. Finite throughout.
      cache_length: how many cached positions of each row are valid.

    Returns:
      The mixed values in ``query``'s dtype; scores and softmax are float32.
    """
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[1]
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

    def mix(weights: Array, values: Array) -> Array:
        weights = weights.astype(values.dtype)
        return jnp.einsum(
            "bkqs,bksh->bkqh",
            weights,
            values,
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    fresh = scores(key)
    if mask is not None:
        tiled = jnp.tile(mask[:, None], (1, 1, groups, 1))  # [B, 1, G T, T]
        fresh = jnp.where(tiled, fresh, -jnp.inf)
    largest = fresh.max(-1, keepdims=True)
    if cached_key is None or cached_value is None or cache_length is None:
        odds = jnp.exp(fresh - largest)
        out = mix(odds, value) / odds.sum(-1, keepdims=True)
    else:
        # One softmax over both parts, without joining them in memory.
        valid = jnp.arange(cached_key.shape[2]) < cache_length[:, None]  # [B, S]
        cached = jnp.where(valid[:, None, None], scores(cached_key), -jnp.inf)
        largest = jnp.maximum(largest, cached.max(-1, keepdims=True))
        odds, cached_odds = jnp.exp(fresh - largest), jnp.exp(cached - largest)
        total = odds.sum(-1, keepdims=True) + cached_odds.sum(-1, keepdims=True)
        out = (mix(odds, value) + mix(cached_odds, cached_value)) / total
    out = out.reshape(batch, kv_heads, groups, length, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, length, heads, head_dim).astype(query.dtype)


def project_out(mixed: Float[Array, "B T N H"], weights: dict[str, Any]) -> Float[Array, "B T D"]:
    """The output projection, with its bias where the configuration asks for one."""
    out = contract("btnh,nhd->btd", mixed, weights["kernel"])
    if "bias" in weights:
        out = out + weights["bias"].astype(out.dtype)
    return out
