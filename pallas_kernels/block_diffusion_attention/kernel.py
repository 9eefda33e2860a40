"""Stock splash attention on a mask that is computed in the kernel, with tile tables of our own.

Splash's own tables come from evaluating the mask on every tile, minutes at 128k; ours come from
``live_tiles``. The rule reads the query's ``query_ids`` (data, one integer a place), so documents
may start anywhere in a row.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.block_diffusion_attention.geometry import Geometry, live_tiles
from pallas_kernels.block_diffusion_attention.mask import BlockDiffusionMask, Visible


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tile sizes of the three kernels, queries x keys; multiples of 128 that divide the length.

    Attributes:
      forward, forward_compute: tile in memory, and the keys of it that are computed at a time.
      dkv, dkv_compute: the same for the gradient of keys and values.
      dq: of the gradient of the queries.
    """

    forward: tuple[int, int]
    forward_compute: int
    dkv: tuple[int, int]
    dkv_compute: int
    dq: tuple[int, int]

    @classmethod
    def square(cls, size: int) -> Tiles:
        """The same size everywhere."""
        return cls((size, size), size, (size, size), size, (size, size))

    @property
    def largest(self) -> int:
        """What the length must be a multiple of: all sizes are powers of two times 128."""
        return int(np.lcm.reduce([*self.forward, *self.dkv, *self.dq]))


def tile_table(
    live: Bool[np.ndarray, "Tq Tk"], by_key: bool = False
) -> tuple[Int[np.ndarray, "1 I J"], Int[np.ndarray, "1 I J"]]:
    """``(data_next, block_mask)`` of splash's ``MaskInfo``, shrunk to the longest list of tiles.

    Args:
      live: which tiles to visit.
      by_key: for the kernel that goes over the query tiles of each key tile.

    Returns:
      Which tile to fetch (a dead step names the next one that is needed), and whether to compute.
    """
    lists = [np.flatnonzero(line) for line in (live.T if by_key else live)]
    width = max(1, *(len(tiles) for tiles in lists))
    fetch = np.zeros((len(lists), width), np.int32)
    run = np.zeros((len(lists), width), np.int32)
    following = 0  # the first tile of the next list that is not empty
    for i in reversed(range(len(lists))):
        tiles = lists[i]
        if by_key:  # as splash has it: dead steps first
            following = int(tiles[0]) if len(tiles) else following
            fetch[i] = following
            fetch[i, width - len(tiles) :] = tiles
            run[i, width - len(tiles) :] = 1
        else:
            fetch[i] = following
            fetch[i, : len(tiles)] = tiles
            run[i, : len(tiles)] = 1
            following = int(tiles[0]) if len(tiles) else following
    if by_key:
        fetch, run = fetch.T, run.T
    return _small(fetch)[None], run.astype(np.int8)[None]


def splash_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    mask: BlockDiffusionMask,
    tiles: Tiles,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """See ``block_diffusion_attention``; the tiles must divide the mask's length.

    Splash reads the one key head of a group of query heads: K and V are not repeated. A float32
    query is multiplied in float32, forward and backward. ``interpret`` runs the kernels on a CPU.
    """
    scaled = (query.astype(jnp.float32) * query.shape[-1] ** -0.5).astype(query.dtype)
    mixed = _attention(scaled.swapaxes(1, 2), key, value, mask, (tiles, interpret))
    return mixed.swapaxes(1, 2)


_Static = tuple[Tiles, bool]


def _precise(query: Array, key: Array, value: Array, mask: BlockDiffusionMask, static: _Static):
    with _precision(query):
        return _splash(query, key, value, mask, static)


_attention: Any = jax.custom_vjp(_precise, nondiff_argnums=(4,))


def _attention_fwd(
    query: Array, key: Array, value: Array, mask: BlockDiffusionMask, static: _Static
):
    with _precision(query):
        return jax.vjp(lambda q, k, v: _splash(q, k, v, mask, static), query, key, value)


def _attention_bwd(static: _Static, pull_back: Any, cotangent: Array):
    with _precision(cotangent):  # splash's products say nothing of precision: the context does
        return (*pull_back(cotangent), None)


_attention.defvjp(_attention_fwd, _attention_bwd)


def _precision(x: Array) -> Any:
    return jax.default_matmul_precision("highest" if x.dtype == jnp.float32 else "default")


def _splash(query: Any, key: Any, value: Any, mask: BlockDiffusionMask, static: _Static) -> Any:
    """``[B, N, T, H]`` and ``[B, K, S, H]`` twice to ``[B, N, T, H]``."""
    tiles, interpret = static
    tables = _tables(mask.geometry, tiles)
    sizes = splash.BlockSizes(
        block_q=tiles.forward[0],
        block_kv=tiles.forward[1],
        block_kv_compute=tiles.forward_compute,
        block_q_dkv=tiles.dkv[0],
        block_kv_dkv=tiles.dkv[1],
        block_kv_dkv_compute=tiles.dkv_compute,
        block_q_dq=tiles.dq[0],
        block_kv_dq=tiles.dq[1],
    )

    def one_row(q: Array, k: Array, v: Array, ids: Any, documents: splash.SegmentIds) -> Any:
        kernel = splash.SplashAttentionKernel(
            *(MaskInfo(fetch, None, run, None, ids) for fetch, run in tables),
            block_sizes=sizes,
            is_mqa=False,
            save_residuals=False,
            mask_value=splash.DEFAULT_MASK_VALUE,
            attn_logits_soft_cap=None,
            residual_checkpoint_name=None,
            mask_function=Visible(mask.geometry),
            interpret=interpret,
        )
        return kernel(q, k, v, documents)

    documents = splash.SegmentIds(mask.query_documents(), mask.key_documents())
    rows = (query, key, value, mask.query_ids(), documents)
    if query.shape[0] == 1:  # jax's TPU interpreter cannot run batched kernels
        return one_row(*jax.tree.map(lambda x: x[0], rows))[None]
    return jax.vmap(one_row)(*rows)


@functools.lru_cache(maxsize=64)
def _tables(geometry: Geometry, tiles: Tiles) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Of the forward, dq and dkv kernels, in the order of splash's arguments."""
    return (
        tile_table(live_tiles(geometry, *tiles.forward)),
        tile_table(live_tiles(geometry, *tiles.dq)),
        tile_table(live_tiles(geometry, *tiles.dkv), by_key=True),
    )


def _small(table: np.ndarray) -> np.ndarray:
    """In the smallest type that holds it: scalar memory is scarce."""
    for kind in (np.int8, np.int16):
        if table.max(initial=0) <= np.iinfo(kind).max:
            return table.astype(kind)
    return table
