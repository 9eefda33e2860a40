"""The plain layers: contraction helper, RMS norm, gated feed-forward network."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def precision_of(dtype: Any) -> jax.lax.Precision | None:
    """Full float32 products for float32, the platform's default otherwise.

    TPUs and tensor cores multiply float32 in reduced precision unless told not to.
    """
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def contract(subscripts: str, x: Float[Array, ...], weight: Float[Array, ...]) -> Array:
    """``einsum`` of an activation with a weight, in the activation's dtype."""
    return jnp.einsum(subscripts, x, weight.astype(x.dtype), precision=precision_of(x.dtype))


def rms_norm(
    x: Float[Array, "... D"], scale: Float[Array, " D"], epsilon: float
) -> Float[Array, "... D"]:
    """Root-mean-square norm: float32 inside, cast back, then scaled (as the released code)."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)
    return scale.astype(x.dtype) * normed.astype(x.dtype)


def gated_mlp(x: Float[Array, "... D"], weights: dict[str, Any]) -> Float[Array, "... D"]:
    """``down(silu(gate(x)) * up(x))``; ``weights`` holds ``gate, up, down`` with a ``kernel``."""
    gate = contract("...d,df->...f", x, weights["gate"]["kernel"])
    up = contract("...d,df->...f", x, weights["up"]["kernel"])
    return contract("...f,fd->...d", jax.nn.silu(gate) * up, weights["down"]["kernel"])
