"""Calls the decode attention kernel: packs the queries, lays out the memory."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.block_decode_attention.kernel import kernel
from pallas_kernels.block_decode_attention.tuning import (
    GRANULE,
    LANES,
    SUBLANES,
    tiling,
)
from pallas_kernels.chips import cores_here


def _pad(array: Array, axis: int, multiple: int) -> Array:
    """Zeros at the end of an axis, up to a multiple."""
    extra = -array.shape[axis] % multiple
    if not extra:
        return array
    return jnp.pad(array, [(0, extra if i == axis else 0) for i in range(array.ndim)])


def decode_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K T H"],
    value: Float[Array, "B K T H"],
    cache_keys: Array,
    cache_values: Array,
    cache_length: Int[Array, " B"],
    layer: Int[Array, ""] | int,
    fresh_length: Int[Array, " B"],
    causal: Bool[Array, " B"] | None,
    cache_scales: tuple[Array, Array] | None,
    *,
    block_length: int | None = None,
    cores: int | None = None,
) -> Float[Array, "B T N H"]:
    """The kernel; arguments as ``block_decode_attention``.

    Args:
      cores: tensor cores of a device; by default those of the platform in use.
    """
    batch, length, query_heads, head_dim = query.shape
    kv_heads, capacity = cache_keys.shape[2:4]
    groups = query_heads // kv_heads
    dtype = query.dtype
    if capacity % GRANULE:  # never in the decoder: copies the cache
        cache_keys, cache_values = (_pad(c, 3, GRANULE) for c in (cache_keys, cache_values))
        capacity = cache_keys.shape[3]
    tiles = tiling(
        (batch, length, query_heads, head_dim),
        kv_heads,
        capacity,
        dtype.itemsize,
        cache_keys.dtype.itemsize,
        cores_here() if cores is None else cores,
    )
    packed = query.reshape(batch, length, kv_heads, groups, head_dim).transpose(0, 2, 4, 1, 3)
    packed = _pad(packed.reshape(batch, kv_heads, head_dim, length * groups), 3, tiles.chunk)
    key, value = (_pad(a.astype(dtype), 2, tiles.fresh) for a in (key, value))
    layer = jnp.asarray(layer, jnp.int32)
    layers, scales = jnp.stack([layer, layer]), cache_scales or ()
    if scales and scales[0].shape[-1] % LANES:  # a few per cent of a layer's cache
        scales = tuple(_pad(jax.lax.dynamic_slice_in_dim(s, layer, 1), 3, LANES) for s in scales)
        layers = layers.at[1].set(0)

    def block(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, tiles.heads, *shape), lambda g, b, *_: (b, g, 0, 0))

    queries, fresh = block(head_dim, tiles.columns), block(tiles.fresh, head_dim)

    hbm = pl.BlockSpec(memory_space=pl.ANY)
    lanes = max(LANES, tiles.tile)
    dma = pltpu.SemaphoreType.DMA((2, tiles.depth))
    scratch: list[Any] = [
        pltpu.VMEM((tiles.depth, tiles.heads, tiles.tile, head_dim), cache_keys.dtype),
        pltpu.VMEM((tiles.depth, tiles.heads, tiles.tile, head_dim), cache_values.dtype),
        pltpu.VMEM((2, tiles.unit, tiles.chunk), jnp.float32),
        pltpu.VMEM((2, SUBLANES, tiles.chunk), jnp.float32),
        pltpu.VMEM((tiles.heads, 1, tiles.columns), jnp.float32),
        pltpu.VMEM((tiles.heads, SUBLANES, tiles.columns), jnp.float32),
        pltpu.VMEM((tiles.heads, head_dim, tiles.columns), jnp.float32),
        dma,
        pltpu.SMEM((5,), jnp.int32),
        pltpu.SMEM((batch + 1,), jnp.int32),
    ]
    if scales:
        scratch += [pltpu.VMEM((tiles.depth, kv_heads, lanes), jnp.float32)] * 2 + [dma]
    seen_keys = capacity + length
    out = pl.pallas_call(
        functools.partial(
            kernel,
            tiles=tiles,
            capacity=capacity,
            block_columns=None if block_length is None else (block_length, block_length * groups),
            quantized=bool(scales),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(kv_heads // tiles.heads, batch),
            in_specs=[queries, fresh, fresh] + [hbm] * (2 + len(scales)),
            out_specs=queries,
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct(packed.shape, dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=min(60 << 20, tiles.vmem + (12 << 20)),
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * batch * length * query_heads * head_dim * seen_keys,
            transcendentals=batch * length * query_heads * seen_keys,
            bytes_accessed=2 * batch * kv_heads * capacity * head_dim * cache_keys.dtype.itemsize
            + 2 * query.size * dtype.itemsize,
        ),
        name="block_decode_attention",
    )(
        layers,
        cache_length.astype(jnp.int32),
        fresh_length.astype(jnp.int32),
        (jnp.zeros(batch, bool) if causal is None else causal).astype(jnp.int32),
        packed,
        key,
        value,
        cache_keys,
        cache_values,
        *scales,
    )
    out = out[..., : length * groups].reshape(batch, kv_heads, head_dim, length, groups)
    return out.transpose(0, 3, 1, 4, 2).reshape(query.shape)
