"""The routed experts in plain XLA: sort, three grouped products, combine. Has a gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.expert_mlp.grouped_matmul import grouped_matmul
from pallas_kernels.quantized import Matrix


def expert_mlp_xla(
    x: Float[Array, "M D"],
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    experts: Int[Array, "M k"],
    gates: Float[Array, "M k"],
    layer: Int[Array, ""] | None = None,
    out_dtype: Any = None,
) -> Float[Array, "M D"]:
    """See ``api.expert_mlp``; ``out_dtype`` is ``x.dtype`` by default."""
    tokens, k = experts.shape
    num_experts = gate.shape[-3]
    with jax.named_scope("dispatch"):
        assigned = experts.reshape(-1)  # [M k], token-major
        assigned = jnp.where((assigned >= 0) & (assigned < num_experts), assigned, num_experts)
        order = jnp.argsort(assigned, stable=True)
        group_sizes = jnp.bincount(assigned, length=num_experts + 1)[:num_experts]
        back = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)))
        rows = permute(jnp.repeat(x, k, axis=0), order, back)
    with jax.named_scope("experts"):
        gated = jax.nn.silu(grouped_matmul(rows, gate, group_sizes, layer))
        hidden = gated * grouped_matmul(rows, up, group_sizes, layer)
        out = grouped_matmul(hidden, down, group_sizes, layer)
    with jax.named_scope("combine"):
        per_token = permute(out, back, order).reshape(tokens, k, -1).astype(jnp.float32)
        return (per_token * gates[..., None]).sum(1).astype(out_dtype or x.dtype)


@jax.custom_vjp
def permute(x: Array, order: Array, back: Array) -> Array:
    """``x[order]``, whose gradient is a gather too: ``back`` is the inverse of ``order``."""
    return x[order]


permute.defvjp(
    lambda x, order, back: (x[order], back), lambda back, given: (given[back], None, None)
)
