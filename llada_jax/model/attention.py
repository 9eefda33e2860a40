"""Grouped-query attention with query/key norm, partial rotary, and an optional cached prefix."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llada_jax.config import ModelConfig
from llada_jax.model.cache import KVCache
from llada_jax.model.layers import contract, precision_of, rms_norm
from llada_jax.model.rotary import apply_rotary
from pallas_kernels import Implementation, WindowMask
from pallas_kernels.block_decode_attention import block_decode_attention
from pallas_kernels.block_diffusion_attention import BlockDiffusionMask, block_diffusion_attention


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
    mask: Bool[Array, "#B T S"] | BlockDiffusionMask | None = None,
    kernels: Implementation | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention over the keys given, with gradients.

    Args:
      query: each of the K key heads serves ``N / K`` of the N query heads.
      key, value: those of the queries' own tokens, and a context's before them.
      mask: which keys a query sees (at least one each); all of them by default. A dense mask is
        for toys: all scores are in memory then.
      kernels: which implementation to take where there are several.

    Returns:
      The mixed values in ``query``'s dtype; scores and softmax are float32.
    """
    if isinstance(mask, BlockDiffusionMask):
        return block_diffusion_attention(query, key, value, mask, implementation=kernels)
    batch, length, heads, head_dim = query.shape
    packed = query.reshape(batch, length, key.shape[1], -1, head_dim)
    precision: Any = precision_of(query.dtype)
    product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    scores = product("btkgh,bksh->bkgts", packed, key) * head_dim**-0.5
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
    odds = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    mixed = product("bkgts,bksh->btkgh", odds, value)
    return mixed.reshape(batch, length, heads, head_dim).astype(query.dtype)


def attend_cached(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K T H"],
    value: Float[Array, "B K T H"],
    cache: KVCache,
    cache_length: Int[Array, " B"],
    layer: Int[Array, ""] | int,
    mask: WindowMask | None = None,
    kernels: Implementation | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention of fresh tokens over a cached prefix and over themselves; no gradient.

    The prefix is read where it lies, up to each row's length.

    Args:
      query, key, value: the fresh tokens'.
      cache: earlier tokens, seen by every query.
      cache_length: how many cached positions of each row are valid.
      layer: which layer of the cache to read.
      mask: who sees whom among the fresh tokens; all see all by default.
      kernels: see ``attend``.
    """
    mask = mask or WindowMask()
    return block_decode_attention(
        query,
        key,
        value,
        cache.keys,
        cache.values,
        cache_length,
        layer,
        fresh_length=mask.length,
        causal=mask.causal,
        block_length=mask.block_length,
        cache_scales=cache.scales,
        implementation=kernels,
    )


def project_out(mixed: Float[Array, "B T N H"], weights: dict[str, Any]) -> Float[Array, "B T D"]:
    """The output projection, with its bias where the configuration asks for one."""
    out = contract("btnh,nhd->btd", mixed, weights["kernel"])
    if "bias" in weights:
        out = out + weights["bias"].astype(out.dtype)
    return out
