"""What stands in jax already for the work of each kernel: the figures to beat.

Each function returns ``(function, shapes)`` for ``aot.compile_for``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from pallas_kernels.report.work import Model

Program = tuple[Callable[..., Any], tuple[Any, ...]]

RAGGED_TILE = 128  # rows of a tile of XLA's ragged_dot, as its ``ragged_dot_tiling`` says


def _shape(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def splash_over_the_cache(model: Model, rows: int, cache: int, tile: int = 2048) -> Program:
    """Stock splash attention of the block's queries over the whole cache.

    At its best: the G query heads of a kv head are packed into one long query, so that keys are
    read once; segment ids tell the valid positions. The fresh tokens lie in the cache already.
    """
    packed = model.heads // model.kv_heads * model.block
    mask = masks.MultiHeadMask([masks.FullMask((packed, cache))] * model.kv_heads)
    sizes = splash.BlockSizes(block_q=packed, block_kv=tile, block_kv_compute=tile)
    kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)

    def attention(query, keys, values, valid):
        ids = splash.SegmentIds(jnp.ones((rows, packed), jnp.int32), valid)
        return jax.vmap(kernel)(query, keys, values, ids)

    kv = _shape(rows, model.kv_heads, cache, model.head_dim)
    query = _shape(rows, model.kv_heads, packed, model.head_dim)
    return attention, (query, kv, kv, _shape(rows, cache, dtype=jnp.int32))


def matmul_softmax_argmax(model: Model, tokens: int) -> Program:
    """The confidence of the likeliest token as one writes it with ``jax.numpy``."""

    def head(hidden, weight):
        scores = jnp.dot(hidden, weight, preferred_element_type=jnp.float32)
        return jnp.argmax(scores, -1), jax.nn.softmax(scores, -1).max(-1)

    return head, (_shape(tokens, model.dim), _shape(model.dim, model.vocabulary))


def three_ragged_dots(model: Model, tokens: int) -> Program:
    """Gate, up and down by ``jax.lax.ragged_dot`` over pairs that are sorted by expert already.

    Sorting, gathering the pairs' rows and summing over a token's experts are left out: they are
    part of the kernel's work and only help the stock alternative.
    """
    pairs = tokens * model.experts_per_token

    def mlp(x, gate, up, down, sizes):
        hidden = jax.nn.silu(jax.lax.ragged_dot(x, gate, sizes))
        hidden = hidden * jax.lax.ragged_dot(x, up, sizes)
        return jax.lax.ragged_dot(hidden, down, sizes)

    wide = _shape(model.experts, model.dim, model.ffn)
    down = _shape(model.experts, model.ffn, model.dim)
    sizes = _shape(model.experts, dtype=jnp.int32)
    return mlp, (_shape(pairs, model.dim), wide, wide, down, sizes)


def ragged_tiles(experts: np.ndarray, num_experts: int, tile: int = RAGGED_TILE) -> int:
    """Pairs of an expert and a tile of rows that it has rows in: trips of ``ragged_dot``'s loop."""
    ends = np.bincount(experts.reshape(-1), minlength=num_experts).cumsum()
    begins = np.concatenate([[0], ends[:-1]])
    spans = (ends + tile - 1) // tile - begins // tile
    return int(spans[ends > begins].sum())


def dense_masked_attention(model: Model, length: int) -> Program:
    """The [x_t ; x_0] mask as a dense array, scores whole, softmax: what XLA makes of it."""
    heads, kv_heads, dim = model.heads, model.kv_heads, model.head_dim

    def attention(query, key, value):  # [1, 2L, N, H], [1, K, 2L, H] twice
        place = jnp.arange(2 * length)
        block, clean = place % length // model.block, place >= length
        own = (block[:, None] == block[None]) & (clean[:, None] == clean[None])
        past = clean[None] & (block[None] < block[:, None])
        grouped = query.reshape(1, 2 * length, kv_heads, heads // kv_heads, dim)
        scores = jnp.einsum("btkgh,bksh->bkgts", grouped, key, preferred_element_type=jnp.float32)
        scores = jnp.where(own | past, scores * dim**-0.5, -1e30)
        odds = jax.nn.softmax(scores, -1).astype(query.dtype)
        return jnp.einsum("bkgts,bksh->btkgh", odds, value).reshape(query.shape)

    kv = _shape(1, kv_heads, 2 * length, dim)
    return attention, (_shape(1, 2 * length, heads, dim), kv, kv)
