"""The obvious way: every expert for every token, dense, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.quantized import Matrix, QuantizedMatrix, dequantize


def expert_mlp_reference(
    x: Float[Array, "M D"],
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    experts: Int[Array, "M k"],
    gates: Float[Array, "M k"],
) -> Float[Array, "M D"]:
    """As ``api.expert_mlp`` without ``layer``; dequantised weights, all ``M x E`` products."""
    full = [
        dequantize(m) if isinstance(m, QuantizedMatrix) else m.astype(jnp.float32)
        for m in (gate, up, down)
    ]
    wide = x.astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        hidden = jax.nn.silu(jnp.einsum("md,edf->mef", wide, full[0]))
        hidden *= jnp.einsum("md,edf->mef", wide, full[1])
        results = jnp.einsum("mef,efd->med", hidden, full[2])  # [M, E, D]
    chosen = jax.nn.one_hot(experts, full[0].shape[0])  # zeros for no expert
    weights = jnp.einsum("mke,mk->me", chosen, gates)
    return jnp.einsum("me,med->md", weights, results).astype(x.dtype)
