"""The plain layers: contraction helper, RMS norm, gated feed-forward network."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.quantized import QuantizedMatrix, matmul


def precision_of(dtype: Any) -> jax.lax.Precision | None:
    """Full float32 products for float32, the platform's default otherwise.

    TPUs and tensor cores multiply float32 in reduced precision unless told not to.
    """
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def contract(
    subscripts: str, x: Float[Array, ...], weight: Float[Array, ...] | QuantizedMatrix, **sizes: int
) -> Array:
    """``einsum`` of an activation with a weight, in the activation's dtype.

    Args:
      subscripts: the contracted axes are the last of ``x`` and the first of ``weight``; the
        result's are the others, in order.
      x: the activation.
      weight: an array, or a quantised matrix ``[I, O]`` into which the weight's axes are folded.
      **sizes: where several axes are folded into O: the sizes of all of them but one.
    """
    if isinstance(weight, QuantizedMatrix):
        return _contract_folded(subscripts, x, weight, sizes)
    return jnp.einsum(subscripts, x, weight.astype(x.dtype), precision=precision_of(x.dtype))


def _contract_folded(
    subscripts: str, x: Array, matrix: QuantizedMatrix, sizes: dict[str, int]
) -> Array:
    inputs, result = subscripts.replace("...", "").split("->")
    of_x, of_weight = inputs.split(",")
    contracted = "".join(axis for axis in of_weight if axis in of_x)
    free = of_weight.removeprefix(contracted)
    if not of_x.endswith(contracted) or result != of_x.removesuffix(contracted) + free:
        raise ValueError(f"{subscripts!r} is no product with a matrix; see contract")
    batch = x.shape[: x.ndim - len(contracted)]
    product = matmul(x.reshape(*batch, matrix.rows), matrix, precision_of(x.dtype))
    return product.reshape(*batch, *(sizes.get(axis, -1) for axis in free))


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
