"""Block-diffusion attention in plain XLA: tile by tile over the live tiles only, O(T tile) memory.

The online softmax of flash attention, forward and backward. The list of live tiles is fixed when
the program is traced; a loop over query tiles holds a loop over the key tiles that each one sees.
(Unrolling them was slower on a CPU, and took three times as long to compile.)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.block_diffusion_attention.geometry import live_tiles
from pallas_kernels.block_diffusion_attention.mask import BlockDiffusionMask, Visible

_LOWEST = -1e30  # finite, so that a tile without a visible key does no harm


def xla_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    mask: BlockDiffusionMask,
    tile: int,
) -> Float[Array, "B T N H"]:
    """See ``block_diffusion_attention``; ``tile`` must divide the mask's length."""
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[1]
    packed = query.reshape(batch, length, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    mixed = _attention(packed, key, value, mask, tile)  # [B, K, G, T, H]
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


def _mixed(query: Array, key: Array, value: Array, mask: BlockDiffusionMask, tile: int):
    return _forward(query, key, value, mask, tile)[0]


_attention: Any = jax.custom_vjp(_mixed, nondiff_argnums=(4,))


def _attention_fwd(query: Array, key: Array, value: Array, mask: BlockDiffusionMask, tile: int):
    mixed, log_total = _forward(query, key, value, mask, tile)
    return mixed, (query, key, value, mask, mixed, log_total)


def _attention_bwd(tile: int, kept: Any, cotangent: Array):
    query, key, value, mask, mixed, log_total = kept
    gradients = _backward(query, key, value, mask, mixed, log_total, cotangent, tile)
    return (*gradients, None)


_attention.defvjp(_attention_fwd, _attention_bwd)


def _dot(spec: str, a: Array, b: Array) -> Array:
    """A product added up in float32; float32 operands are not rounded."""
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=exact, preferred_element_type=jnp.float32)


class _Tiles:
    """Reads tiles, and knows which there are."""

    def __init__(self, mask: BlockDiffusionMask, tile: int):
        live = live_tiles(mask.geometry, tile, tile)
        self.tile = tile
        self.counts = live.sum(1)
        self.firsts = np.concatenate([[0], np.cumsum(self.counts)[:-1]])
        self.key_tiles = np.nonzero(live)[1]
        self.visible = Visible(mask.geometry)
        self.query_ids = mask.query_ids()
        self.query_documents = mask.query_documents()
        self.key_documents = mask.key_documents()

    def take(self, x: Array, i: Any, axis: int) -> Array:
        """Tile ``i`` of ``x`` along ``axis``."""
        return lax.dynamic_slice_in_dim(x, i * self.tile, self.tile, axis)

    def seen(self, i: Any, j: Any) -> Array:  # Bool[B, 1, 1, tile, tile]
        """The mask of query tile ``i`` and key tile ``j``."""
        keys = j * self.tile + jnp.arange(self.tile)
        mask = self.visible(self.take(self.query_ids, i, 1)[:, :, None], keys)
        documents = self.take(self.key_documents, j, 1)[:, None]
        mask &= self.take(self.query_documents, i, 1)[:, :, None] == documents
        return mask[:, None, None]

    def each_query(self, step: Any, carry: Any) -> tuple[Any, Any]:
        """``step(carry, i, keys) -> (carry, outputs)`` for every query tile.

        ``keys(body, carry)`` runs ``body(j, carry)`` over the key tiles that tile ``i`` sees.
        """
        key_tiles = jnp.asarray(self.key_tiles, jnp.int32)

        def looped(carry: Any, at: tuple[Array, Array, Array]):
            i, first, count = at

            def keys(body: Any, carry: Any) -> Any:
                return lax.fori_loop(
                    first, first + count, lambda p, carry: body(key_tiles[p], carry), carry
                )

            return step(carry, i, keys)

        indices = np.arange(len(self.counts))
        table: Any = [jnp.asarray(x, jnp.int32) for x in (indices, self.firsts, self.counts)]
        return lax.scan(looped, carry, tuple(table))


def _joined(tiles: Array, axis: int) -> Array:
    """``[count, …, tile, …]`` to one array; ``axis`` counts without the leading one."""
    tiles = jnp.moveaxis(tiles, 0, axis)
    return tiles.reshape(*tiles.shape[:axis], -1, *tiles.shape[axis + 2 :])


def _forward(query: Array, key: Array, value: Array, mask: BlockDiffusionMask, tile: int):
    """Mixed values ``[B, K, G, T, H]`` and the logarithm of the softmax's sum ``[B, K, G, T]``."""
    tiles = _Tiles(mask, tile)
    scale = query.shape[-1] ** -0.5

    def step(_: None, i: Any, keys: Any):
        q = tiles.take(query, i, 3)

        def body(j: Any, carry: tuple[Array, Array, Array]):
            largest, total, mixed = carry
            scores = _dot("bkgqh,bksh->bkgqs", q, tiles.take(key, j, 2)) * scale
            scores = jnp.where(tiles.seen(i, j), scores, _LOWEST)
            new = jnp.maximum(largest, scores.max(-1))
            shrink, odds = jnp.exp(largest - new), jnp.exp(scores - new[..., None])
            v = tiles.take(value, j, 2)
            added = _dot("bkgqs,bksh->bkgqh", odds.astype(v.dtype), v)
            total = total * shrink + odds.sum(-1)
            return new, total, mixed * shrink[..., None] + added

        shape = q.shape[:-1]
        start = (jnp.full(shape, _LOWEST), jnp.zeros(shape), jnp.zeros(q.shape, jnp.float32))
        largest, total, mixed = keys(body, start)
        return None, ((mixed / total[..., None]).astype(query.dtype), largest + jnp.log(total))

    _, (mixed, log_total) = tiles.each_query(step, None)
    return _joined(mixed, 3), _joined(log_total, 3)


def _backward(
    query: Array,
    key: Array,
    value: Array,
    mask: BlockDiffusionMask,
    mixed: Array,
    log_total: Array,
    cotangent: Array,
    tile: int,
) -> tuple[Array, Array, Array]:
    """Gradients; those of keys and values are added up in float32."""
    tiles = _Tiles(mask, tile)
    scale = query.shape[-1] ** -0.5
    inner = (mixed.astype(jnp.float32) * cotangent.astype(jnp.float32)).sum(-1)

    def add(total: Array, j: Any, piece: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(
            total, tiles.take(total, j, 2) + piece, j * tile, axis=2
        )

    def step(carry: tuple[Array, Array], i: Any, keys: Any):
        q, g = tiles.take(query, i, 3), tiles.take(cotangent, i, 3)
        logs = tiles.take(log_total, i, 3)[..., None]
        centre = tiles.take(inner, i, 3)[..., None]

        def body(j: Any, carry: tuple[Array, Array, Array]):
            dq, dk, dv = carry
            k, v = tiles.take(key, j, 2), tiles.take(value, j, 2)
            scores = _dot("bkgqh,bksh->bkgqs", q, k) * scale
            odds = jnp.where(tiles.seen(i, j), jnp.exp(scores - logs), 0.0)
            dv = add(dv, j, _dot("bkgqs,bkgqh->bksh", odds.astype(g.dtype), g))
            slope = odds * (_dot("bkgqh,bksh->bkgqs", g, v) - centre) * scale
            slope = slope.astype(q.dtype)
            dk = add(dk, j, _dot("bkgqs,bkgqh->bksh", slope, q))
            return dq + _dot("bkgqs,bksh->bkgqh", slope, k), dk, dv

        dq, dk, dv = keys(body, (jnp.zeros(q.shape, jnp.float32), *carry))
        return (dk, dv), dq.astype(query.dtype)

    zeros = (jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32))
    (dk, dv), dq = tiles.each_query(step, zeros)
    return _joined(dq, 3), dk.astype(key.dtype), dv.astype(value.dtype)
