"""Keys and values of committed blocks."""

from __future__ import annotations

from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from llada_jax.config import ModelConfig


@no_type_check  # a pytree also holds tracers, shapes, shardings
class KVCache(flax.struct.PyTreeNode):
    """Attention memory of a batch.

    Under block-causal attention the entries of block ``k`` depend on the tokens of blocks
    ``<= k`` alone. Rows are read up to a length that the caller passes; what lies beyond it is
    arbitrary, but finite. Invariant kept by the decoder: below that length, every entry comes from
    a forward pass whose input was the final tokens.

    An int8 cache (half the bytes of bfloat16) holds ``round(x / scale)`` with one scale a position
    and kv head, the largest magnitude there over 127. Sampling from it is close to, not equal to,
    sampling without a cache.

    Attributes:
      keys, values: ``[layers, B, K, S, H]``, of the activations' type or int8.
      key_scales, value_scales: ``Float[Array, "layers B K S"]`` of an int8 cache.
    """

    keys: Num[Array, "layers B K S H"]
    values: Num[Array, "layers B K S H"]
    key_scales: Float[Array, "layers B K S"] | None = None
    value_scales: Float[Array, "layers B K S"] | None = None

    @property
    def scales(self) -> tuple[Float[Array, "layers B K S"], Float[Array, "layers B K S"]] | None:
        """Both scales, or ``None``."""
        if self.key_scales is None or self.value_scales is None:
            return None
        return self.key_scales, self.value_scales

    def quantized(self) -> KVCache:
        """The same entries in int8."""
        keys, key_scales = _to_int8(self.keys)
        values, value_scales = _to_int8(self.values)
        return KVCache(keys, values, key_scales, value_scales)


def _to_int8(x: Float[Array, "*a H"]) -> tuple[Int[Array, "*a H"], Float[Array, "*a"]]:
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(-1)
    scale = jnp.where(largest > 0, largest / 127.0, 1.0)
    return jnp.round(x / scale[..., None]).astype(jnp.int8), scale


def init_cache(config: ModelConfig, batch: int, length: int, dtype: Any) -> KVCache:
    """A zeroed cache for ``batch`` rows of ``length`` tokens; ``dtype`` may be int8."""
    shape = (config.num_hidden_layers, batch, config.num_key_value_heads, length, config.head_dim)
    keys, values = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
    if dtype != jnp.int8:
        return KVCache(keys, values)
    return KVCache(keys, values, jnp.ones(shape[:-1]), jnp.ones(shape[:-1]))


def write_cache(
    cache: KVCache,
    fresh: KVCache,
    start: Int[Array, " B"],
    write: Bool[Array, "B T"],
) -> KVCache:
    """Stores fresh entries at ``[start, start + T)`` of each row, where ``write`` is set.

    Args:
      cache: length ``S`` memory.
      fresh: entries of ``T <= S`` tokens a row, not quantised; they are if ``cache`` is.
      start: first position of each row; ``start + T <= S``.
      write: which of the ``T`` entries to store; the others keep what the cache held.
    """

    batch, width = write.shape
    if cache.scales is not None:
        fresh = fresh.quantized()

    # One in-place update a row. A scatter over the rows would copy the whole memory on CPU.
    def store_row(row, memory: KVCache) -> KVCache:
        def store(old: Array, new: Array) -> Array:
            layers, _, heads, _, *dim = old.shape
            at = (0, row, 0, start[row], *[0] * len(dim))
            kept = jax.lax.dynamic_slice(old, at, (layers, 1, heads, width, *dim))
            new = jax.lax.dynamic_slice_in_dim(new, row, 1, axis=1).astype(old.dtype)
            chosen = write[row].reshape(width, *[1] * len(dim))
            return jax.lax.dynamic_update_slice(old, jnp.where(chosen, new, kept), at)

        return jax.tree.map(store, memory, fresh)

    return jax.lax.fori_loop(0, batch, store_row, cache)
