"""Attention of fresh tokens over a cached prefix: checks, dispatch, meshes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Num

from pallas_kernels.block_decode_attention.call import decode_attention
from pallas_kernels.block_decode_attention.tuning import tiling
from pallas_kernels.block_decode_attention.xla import decode_attention_xla
from pallas_kernels.chips import cores_here
from pallas_kernels.dispatch import Implementation, mesh_axes, run


def block_decode_attention(
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
    cache_scales: tuple[Float[Array, "layers B K S"], Float[Array, "layers B K S"]] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention of each row's fresh tokens over its cached prefix and over themselves.

    With two cached positions, four fresh tokens and ``block_length = 2`` (rows are queries)::

        everything        fresh_length = 2     causal
        1 1 | 1 1 1 1     1 1 | 1 1 . .        1 1 | 1 1 . .
        1 1 | 1 1 1 1     1 1 | 1 1 . .        1 1 | 1 1 . .
        1 1 | 1 1 1 1     1 1 | 1 1 . .        1 1 | 1 1 1 1
        1 1 | 1 1 1 1     1 1 | 1 1 . .        1 1 | 1 1 1 1

    Each row reads its own length of the cache, and that alone, where it lies. No gradient.

    Args:
      query: the fresh tokens; each of the K kv heads serves ``N / K`` of the N query heads.
      key, value: the fresh tokens'.
      cache_keys, cache_values: earlier tokens of all layers, seen by every query. What lies beyond
        a row's length may be anything.
      cache_length: valid cached positions of each row, ``0 … S``.
      layer: which layer of the cache to read.
      fresh_length: how many of the fresh keys of each row are seen; all by default.
      causal: rows in which key ``j`` is seen by query ``i`` if ``j``'s block is not later than
        ``i``'s; none by default.
      block_length: tokens a block; needed with ``causal``.
      cache_scales: of an int8 cache: one float32 a position and kv head, for keys and for values.
      implementation: see ``dispatch.run``. By default XLA also where the fresh tokens are too many
        for the kernel's memory (thousands).

    Returns:
      The mixed values in ``query``'s dtype; scores and softmax are float32. Zeros for a query that
      sees nothing.

    Raises:
      ValueError: for an int8 cache without scales, for ``causal`` without ``block_length``, for
        query heads that the kv heads do not divide; with ``implementation="pallas"`` for too many
        fresh tokens.
    """
    heads, kv_heads = query.shape[2], key.shape[1]
    if heads % kv_heads:
        raise ValueError(f"{kv_heads} kv heads do not divide {heads} query heads")
    if causal is not None and (block_length is None or block_length < 1):
        raise ValueError(f"causal needs a block_length of at least 1, not {block_length}")
    if (cache_keys.dtype == jnp.int8) != (cache_scales is not None):
        raise ValueError(
            f"a cache of {cache_keys.dtype} {'with' if cache_scales is not None else 'without'} "
            f"scales: pass cache_scales with an int8 cache and only then"
        )
    operands = (
        query,
        key,
        value,
        cache_keys,
        cache_values,
        cache_length,
        jnp.asarray(layer, jnp.int32),
        fresh_length,
        causal,
        cache_scales,
    )

    def local(*operands):
        chosen = implementation
        if chosen is None and not _fits(*operands[:4]):
            chosen = "xla"
        return run(
            chosen,
            functools.partial(_pallas, block_length=block_length),
            functools.partial(decode_attention_xla, block_length=block_length),
            *operands,
        )

    with jax.named_scope("block_decode_attention"):
        mesh, _ = mesh_axes()
        if mesh is None or mesh.size == 1:
            return local(*operands)
        # Neither a kernel nor a loop with each row's own length can be partitioned by XLA.
        _, row_axes = mesh_axes("data")
        _, head_axes = mesh_axes("tensor")
        rows = "data" if row_axes and query.shape[0] % mesh.shape["data"] == 0 else None
        over = "tensor" if head_axes and kv_heads % mesh.shape["tensor"] == 0 else None
        fresh = PartitionSpec(rows, over)
        cache = PartitionSpec(None, rows, over)
        tokens = PartitionSpec(rows, None, over)
        by_row = PartitionSpec(rows)
        specs = (
            tokens,
            fresh,
            fresh,
            cache,
            cache,
            by_row,
            PartitionSpec(),
            None if fresh_length is None else by_row,
            None if causal is None else by_row,
            None if cache_scales is None else (cache, cache),
        )
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=tokens, check_vma=False)(
            *operands
        )


def _fits(query, key, value, cache_keys) -> bool:
    batch, length, heads, head_dim = query.shape
    kv_heads, capacity = cache_keys.shape[2:4]
    sizes = query.dtype.itemsize, cache_keys.dtype.itemsize
    try:
        tiling((batch, length, heads, head_dim), kv_heads, capacity, *sizes, cores_here())
    except ValueError:
        return False
    return True


def _pallas(
    query, key, value, keys, values, cache_length, layer, fresh_length, causal, scales, block_length
):
    batch, length = query.shape[:2]
    if fresh_length is None:
        fresh_length = jnp.full(batch, length, jnp.int32)
    return decode_attention(
        query,
        key,
        value,
        keys,
        values,
        cache_length,
        layer,
        fresh_length,
        causal,
        scales,
        block_length=None if causal is None else block_length,
    )
