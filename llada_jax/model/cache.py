"""Keys and values of committed blocks."""

from __future__ import annotations

from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llada_jax.config import ModelConfig


@no_type_check  # a pytree also holds tracers, shapes, shardings
class KVCache(flax.struct.PyTreeNode):
    """Attention memory of a batch.

    Under block-causal attention the entries of block ``k`` depend on the tokens of blocks
    ``<= k`` alone. Rows are read up to a length that the caller passes; what lies beyond it is
    arbitrary, but finite. Invariant kept by the decoder: below that length, every entry comes from
    a forward pass whose input was the final tokens.
    """

    keys: Float[Array, "layers B K S H"]
    values: Float[Array, "layers B K S H"]


# Logical axes of both arrays of the cache.
CACHE_AXES = (None, "batch", "kv_heads", None, None)


def init_cache(config: ModelConfig, batch: int, length: int, dtype: Any) -> KVCache:
    """A zeroed cache for ``batch`` rows of ``length`` tokens."""
    shape = (config.num_hidden_layers, batch, config.num_key_value_heads, length, config.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def write_cache(
    cache: KVCache,
    fresh: KVCache,
    start: Int[Array, " B"],
    write: Bool[Array, "B T"],
) -> KVCache:
    """Stores fresh entries at ``[start, start + T)`` of each row, where ``write`` is set.

    Args:
      cache: length ``S`` memory.
      fresh: entries of ``T <= S`` tokens a row.
      start: first position of each row; ``start + T <= S``.
      write: which of the ``T`` entries to store; the others keep what the cache held.
    """

    batch, width = write.shape

    # One in-place update a row. A scatter over the rows would copy the whole memory on CPU.
    def store_row(row, memory: KVCache) -> KVCache:
        def store(old: Array, new: Array) -> Array:
            at = (0, row, 0, start[row], 0)
            layers, _, heads, _, dim = old.shape
            kept = jax.lax.dynamic_slice(old, at, (layers, 1, heads, width, dim))
            new = jax.lax.dynamic_slice_in_dim(new, row, 1, axis=1).astype(old.dtype)
            merged = jnp.where(write[row][:, None], new, kept)
            return jax.lax.dynamic_update_slice(old, merged, at)

        return jax.tree.map(store, memory, fresh)

    return jax.lax.fori_loop(0, batch, store_row, cache)
