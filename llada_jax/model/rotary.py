"""Rotary position embedding on the first part of each head."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llada_jax.config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """Rotation speeds and the factor on cos and sin.

    Returns:
      ``(frequencies, scaling)``: float64 ``[rotary_dim / 2]`` in radians a position, and 1 except
      under yarn.
    """
    dim, theta, scaling = config.rotary_dim, config.rope_theta, config.rope_scaling
    frequencies = theta ** -(np.arange(0, dim, 2) / dim)
    if scaling is None:
        return frequencies, 1.0
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.rope_type == "llama3":
        return _llama3(frequencies, scaling), 1.0
    return _yarn(frequencies, scaling, config)


def _llama3(frequencies: np.ndarray, s: RopeScaling) -> np.ndarray:
    """Long wavelengths are stretched by ``factor``, short ones kept, a linear blend between."""
    assert s.original_max_position_embeddings is not None
    turns = s.original_max_position_embeddings * frequencies / (2 * math.pi)
    blend = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return frequencies * (blend + (1 - blend) / s.factor)


def _yarn(frequencies: np.ndarray, s: RopeScaling, config: ModelConfig) -> tuple[np.ndarray, float]:
    """YaRN: a ramp over the dimensions between ``beta_fast`` and ``beta_slow`` turns."""
    length = s.original_max_position_embeddings or config.max_position_embeddings
    dim = config.rotary_dim

    def dimension(turns: float) -> float:
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = max(math.floor(dimension(s.beta_fast)), 0)
    high = min(math.ceil(dimension(s.beta_slow)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    attention_factor = s.attention_factor
    if attention_factor is None:
        attention_factor = 0.1 * math.log(s.factor) + 1.0 if s.factor > 1 else 1.0
    return frequencies * (ramp / s.factor + (1 - ramp)), attention_factor


def rotary_tables(
    positions: Int[Array, "B T"], config: ModelConfig, dtype: Any
) -> tuple[Float[Array, "B T R"], Float[Array, "B T R"]]:
    """Cosines and sines for ``R = rotary_dim / 2`` frequencies: float32, then cast to ``dtype``."""
    frequencies, scaling = inverse_frequencies(config)
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    return (jnp.cos(angles) * scaling).astype(dtype), (jnp.sin(angles) * scaling).astype(dtype)


def apply_rotary(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T R"], sin: Float[Array, "B T R"]
) -> Float[Array, "B T N H"]:
    """Rotates dimension ``i`` with ``R + i`` (half rotation); from ``2 R`` on, nothing changes."""
    half = cos.shape[-1]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
