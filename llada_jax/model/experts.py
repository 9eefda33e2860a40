"""The mixture of experts: route, sort, grouped matrix products, combine; dropless and exact."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llada_jax.config import ModelConfig
from llada_jax.model.grouped_matmul import grouped_matmul
from llada_jax.model.layers import gated_mlp
from llada_jax.model.router import route


def mixture_of_experts(
    x: Float[Array, "B T D"],
    weights: dict[str, Any],
    config: ModelConfig,
    live: Bool[Array, "B T"] | None = None,
    layer: Int[Array, ""] | None = None,
) -> Float[Array, "B T D"]:
    """Routed experts plus the shared expert, which is not scaled.

    Args:
      x: normed hidden states.
      weights: ``router``, ``experts``, and ``shared`` where there is one.
      config: the model.
      live: tokens that matter. The others reach no routed expert, so they cost nothing there and
        get an arbitrary finite result.
      layer: given when ``weights["experts"]`` holds all layers ``[L, E, ...]``; see
        ``grouped_matmul``.
    """
    batch, length, dim = x.shape
    flat = x.reshape(-1, dim)  # [M, D]
    with jax.named_scope("route"):
        router = weights["router"]
        experts, gates = route(flat, router["kernel"], router["expert_bias"], config)
    with jax.named_scope("dispatch"):
        k = config.num_experts_per_tok
        if live is not None:
            experts = jnp.where(live.reshape(-1, 1), experts, config.num_experts)
        assigned = experts.reshape(-1)  # [M k], token-major
        order = jnp.argsort(assigned, stable=True)
        group_sizes = jnp.bincount(assigned, length=config.num_experts + 1)[: config.num_experts]
        rows = flat[order // k]
    with jax.named_scope("experts"):
        stacks = weights["experts"]
        gate = grouped_matmul(rows, stacks["gate"], group_sizes, layer)
        up = grouped_matmul(rows, stacks["up"], group_sizes, layer)
        out = grouped_matmul(jax.nn.silu(gate) * up, stacks["down"], group_sizes, layer)
    with jax.named_scope("combine"):
        back = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)))
        per_token = out[back].reshape(-1, k, dim).astype(jnp.float32)
        mixed = (per_token * gates[..., None]).sum(1).astype(x.dtype)
    if "shared" in weights:
        with jax.named_scope("shared_expert"):
            mixed = mixed + gated_mlp(flat, weights["shared"])
    return mixed.reshape(batch, length, dim)
