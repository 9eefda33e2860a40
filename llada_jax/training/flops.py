"""Floating-point operations of a training step, and what the device can do."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp

from llada_jax.config import ModelConfig
from llada_jax.diffusion import DiffusionConfig
from llada_jax.model.layers import precision_of
from llada_jax.model.weights import count_parameters


def flops_per_clean_token(
    config: ModelConfig, diffusion: DiffusionConfig, length: float, supervised: float = 1.0
) -> float:
    """Operations of forward and backward for each token of x_0, without recomputation.

    Two for each active weight and token forward, twice that backward. The clean copy goes through
    the model once a step, a noisy copy once a round; the head runs on supervised tokens of noisy
    copies only. Attention counts the pairs that see each other: a clean token half the row on
    average, a noisy one that and its block.

    Args:
      config: the model.
      diffusion: rounds and copies.
      length: tokens a document.
      supervised: share of tokens that are supervised.
    """
    counted = count_parameters(config)
    head = config.hidden_size * config.vocab_size
    noisy = diffusion.rounds * diffusion.copies
    clean = 0 if diffusion.mdlm else 1
    pairs = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    seen = length if diffusion.mdlm else min(length / 2 + diffusion.block_size, length)
    forward = (clean + noisy) * 2 * counted.active_without_embedding
    forward += noisy * 2 * head * supervised
    forward += pairs * (clean * length / 2 + noisy * seen)
    return 3.0 * forward


def measured_peak_flops(dtype: jnp.dtype | type = jnp.float32, size: int = 2048) -> float:
    """Operations a second of a large square matrix product on one device: the roof for MFU.

    Takes about a second. On accelerators a larger product is used.

    Args:
      dtype: of the matrices.
      size: rows on a CPU.
    """
    size = size if jax.default_backend() == "cpu" else 4 * size
    matrix = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a: jnp.matmul(a, a, precision=precision_of(a.dtype)))
    product(matrix).block_until_ready()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        product(matrix).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
