"""Tile sizes of the kernel, and when it is not the right one."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels.expert_mlp.weights import values_and_scales

_MIB = 1 << 20
_LIMIT = 60 * _MIB  # v5p and tpu7x have 64
_SPARE = 4 * _MIB  # what the compiler needs itself
MAX_TOKENS = 1024


class Tiles(NamedTuple):
    """How the kernel cuts its work.

    Attributes:
      rows: token-expert pairs that go through an expert's weights together.
      columns: of F, held in VMEM at a time.
      chunk: columns multiplied together: of gate and up, and of down.
      vmem_bytes: to be asked for.
    """

    rows: int
    columns: int
    chunk: tuple[int, int]
    vmem_bytes: int


def choose(tokens: int, dim: int, k: int, gate: Any, dtype: Any, cores: int = 1) -> Tiles | None:
    """Tiles for stacks ``[layers, E, D, F]``; ``None`` if the tokens do not fit in VMEM.

    A tile of rows is about twice the mean number of tokens of an expert: most experts then need one
    tile, so that their weights go through the matrix unit once.
    """
    if tokens > MAX_TOKENS:
        return None
    num_experts, ffn = gate.shape[1], gate.shape[-1]
    mean = max(1, tokens * k // num_experts)
    least = 16
    rows = min(64, max(least, 2 << (mean - 1).bit_length()))
    size = jnp.dtype(dtype).itemsize
    out = size if cores == 1 else 4
    fixed = _padded(tokens, 8) * _padded(dim, 128) * (size + 4 + out)
    fixed += rows * (2 * dim * size + 4 * dim + 4 * dim) + rows * ffn * size
    expert = 3 * sum(
        a.size // (a.shape[0] * a.shape[1]) * a.dtype.itemsize for a in values_and_scales(gate)
    )
    columns = ffn
    while fixed + 2 * expert * columns // ffn > _LIMIT - _SPARE:
        if columns % 256:
            return None
        columns //= 2
    # Sums of a chunk stay in registers: 64 of [8, 128] at most.
    chunk = min(256, columns), min(512 if rows < 64 else 256, dim)
    return Tiles(rows, columns, chunk, _LIMIT)


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
