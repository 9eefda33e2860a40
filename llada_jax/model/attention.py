"""Grouped-query attention with query/key norm, partial rotary, and an optional cached prefix."""

from __future__ import annotations

from typing import Any

import jax
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
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Queries, keys and values; the norm over a whole head comes before the rotation."""

    def project(name: str) -> Array:
        projected = contract("btd,dnh->btnh", x, weights[name]["kernel"])
        if "bias" in weights[name]:
            projected = projected + weights[name]["bias"].astype(projected.dtype)
        return projected

    query = rms_norm(project("query"), weights["query_norm"]["scale"], config.rms_norm_eps)
    key = rms_norm(project("key"), weights["key_norm"]["scale"], config.rms_norm_eps)
    return apply_rotary(query, cos, sin), apply_rotary(key, cos, sin), project("value")


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    mask: Bool[Array, "#B T T"] | None = None,
    cached_key: Float[Array, "B S K H"] | None = None,
    cached_value: Float[Array, "B S K H"] | None = None,
    cache_length: Int[Array, " B"] | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention of fresh queries over fresh keys and a cached prefix.

    Args:
      query, key, value: the fresh tokens; each of the K heads serves ``N / K`` query heads.
      mask: which fresh keys a fresh query sees; all of them by default.
      cached_key, cached_value: earlier tokens, seen by every query.
      cache_length: how many cached positions of each row are valid.

    Returns:
      The mixed values in ``query``'s dtype; scores and softmax are float32.
    """
    batch, length, heads, head_dim = query.shape
    groups = heads // key.shape[2]
    precision = precision_of(query.dtype)
    grouped = query.reshape(batch, length, key.shape[2], groups, head_dim)

    def scores(keys: Array) -> Array:  # [B, K, G, T, keys]
        raw = jnp.einsum(
            "btkgh,bskh->bkgts",
            grouped,
            keys,
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        return raw * head_dim**-0.5

    minus_infinity = jnp.float32(-jnp.inf)
    fresh = scores(key)
    if mask is not None:
        fresh = jnp.where(mask[:, None, None], fresh, minus_infinity)
    values = value
    if cached_key is not None and cached_value is not None and cache_length is not None:
        valid = jnp.arange(cached_key.shape[1]) < cache_length[:, None]  # [B, S]
        cached = jnp.where(valid[:, None, None, None], scores(cached_key), minus_infinity)
        all_scores = jnp.concatenate([cached, fresh], axis=-1)
        # Slots beyond the length weigh nothing, but 0 * NaN would still spread.
        cached_value = jnp.where(valid[:, :, None, None], cached_value, 0)
        values = jnp.concatenate([cached_value, value], axis=1)
    else:
        all_scores = fresh
    weights = jax.nn.softmax(all_scores, axis=-1).astype(query.dtype)
    mixed = jnp.einsum("bkgts,bskh->btkgh", weights, values, precision=precision)
    return mixed.reshape(batch, length, heads, head_dim)


def project_out(
    mixed: Float[Array, "B T N H"], weights: dict[str, Any]
) -> Float[Array, "B T D"]:
    """The output projection, with its bias where the configuration asks for one."""
    out = contract("btnh,nhd->btd", mixed, weights["kernel"])
    if "bias" in weights:
        out = out + weights["bias"].astype(out.dtype)
    return out
