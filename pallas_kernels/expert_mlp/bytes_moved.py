"""HBM bytes of the kernel, counted through its own block index maps, and the least possible."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.expert_mlp import tuning
from pallas_kernels.expert_mlp.kernel import blocks_of, index_maps
from pallas_kernels.expert_mlp.weights import values_and_scales
from pallas_kernels.quantized import quantize


def traffic(
    experts: np.ndarray,
    dim: int,
    ffn: int,
    num_experts: int,
    scheme: str | None = None,
    dtype: Any = jnp.bfloat16,
    cores: int = 1,
) -> int:
    """Bytes that the kernel copies between HBM and VMEM for one layer.

    Each operand's block index is evaluated at every grid step in order; a block is copied where it
    differs from the step before, as the pipeline does.

    Args:
      experts: each token's experts ``[M, k]``; ids from ``num_experts`` on are none.
      dim, ffn, num_experts: D, F, E.
      scheme: how the weights are quantised, if they are.
      dtype: of tokens and results, and of weights that are not quantised.
      cores: tensor cores of a device.

    Raises:
      ValueError: if the tokens do not fit in VMEM.
    """
    tokens, k = experts.shape
    matrices = _shapes(dim, ffn, num_experts, scheme, dtype)
    tiles = tuning.choose(tokens, dim, k, matrices[0], dtype, cores)
    if tiles is None:
        raise ValueError(f"{tokens} tokens of {dim} do not fit in VMEM")
    used = np.unique(experts[experts < num_experts])
    ids = np.zeros(num_experts, int)
    ids[: len(used)] = used
    meta = (0, len(used))
    maps = index_maps(cores)
    size = jnp.dtype(dtype).itemsize
    blocks = [("x", tokens * dim * size)]
    for matrix, is_down in zip(matrices, (False, False, True), strict=True):
        for array, (block, name) in zip(
            values_and_scales(matrix), blocks_of(matrix, tiles.columns, is_down), strict=True
        ):
            blocks.append((name, math.prod(block) * array.dtype.itemsize))
    total = cores * tokens * dim * (size if cores == 1 else 4)  # results
    if cores > 1:
        total += cores * tokens * dim * 4 + tokens * dim * size  # and their sum
    for name, block_bytes in blocks:
        for core in range(cores):
            before = None
            for i in range(max(1, -(-len(used) // cores))):
                for f in range(ffn // tiles.columns):
                    index = tuple(map(int, maps[name](core, i, f, meta, ids)))
                    total += block_bytes * (index != before)
                    before = index
    return total


def least_bytes(
    experts: np.ndarray,
    dim: int,
    ffn: int,
    num_experts: int,
    scheme: str | None = None,
    dtype: Any = jnp.bfloat16,
) -> int:
    """Weights and scales of the touched experts once, tokens once, results once."""
    matrices = _shapes(dim, ffn, num_experts, scheme, dtype)
    expert = sum(
        a.size // num_experts * a.dtype.itemsize for m in matrices for a in values_and_scales(m)
    )
    touched = len(np.unique(experts[experts < num_experts]))
    return touched * expert + 2 * len(experts) * dim * jnp.dtype(dtype).itemsize


def _shapes(dim: int, ffn: int, num_experts: int, scheme: str | None, dtype: Any) -> list[Any]:
    """Shapes of one layer's stacks: gate, up, down."""
    shapes = [
        jax.ShapeDtypeStruct((1, num_experts, *s), dtype)
        for s in ((dim, ffn), (dim, ffn), (ffn, dim))
    ]
    if scheme is None:
        return shapes
    return [jax.eval_shape(functools.partial(quantize, scheme=scheme), s) for s in shapes]
