"""The mixture of experts: route, sort, grouped matrix products, combine; dropless and exact."""

from __future__ import annotations

from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llada_jax.config import ModelConfig
from llada_jax.model.grouped_matmul import grouped_matmul
from llada_jax.model.layers import gated_mlp
from llada_jax.model.router import choose_experts, router_logits


@no_type_check  # a pytree also holds tracers, shapes, shardings
class RouterStats(flax.struct.PyTreeNode):
    """What a forward pass tells about routing, for load balancing; stacked over layers.

    Attributes:
      load: tokens that each expert got. Tokens that are not live are not counted.
      z: sum over live tokens of the squared log-sum-exp of their router logits (ST-MoE's z-loss).
    """

    load: Int[Array, "*layers E"]
    z: Float[Array, "*layers"]


def mixture_of_experts(
    x: Float[Array, "B T D"],
    weights: dict[str, Any],
    config: ModelConfig,
    live: Bool[Array, "B T"] | None = None,
    layer: Int[Array, ""] | None = None,
) -> tuple[Float[Array, "B T D"], RouterStats]:
    """Routed experts plus the shared expert, which is not scaled.

    Args:
      x: normed hidden states.
      weights: ``router``, ``experts``, and ``shared`` where there is one.
      config: the model.
      live: tokens that matter. The others reach no routed expert, so they cost nothing there and
        get an arbitrary finite result.
      layer: given when ``weights["experts"]`` holds all layers ``[L, E, ...]``; see
        ``grouped_matmul``.

    Returns:
      The mixture, and what this layer's router did.
    """
    batch, length, dim = x.shape
    flat = x.reshape(-1, dim)  # [M, D]
    with jax.named_scope("route"):
        router = weights["router"]
        logits = router_logits(flat, router["kernel"])
        experts, gates = choose_experts(logits, router["expert_bias"], config)
        z = jnp.square(jax.nn.logsumexp(logits, axis=-1))
        if live is not None:
            z = jnp.where(live.reshape(-1), z, 0.0)
    with jax.named_scope("dispatch"):
        k = config.num_experts_per_tok
        if live is not None:
            experts = jnp.where(live.reshape(-1, 1), experts, config.num_experts)
        assigned = experts.reshape(-1)  # [M k], token-major
        order = jnp.argsort(assigned, stable=True)
        group_sizes = jnp.bincount(assigned, length=config.num_experts + 1)[: config.num_experts]
        back = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)))
        rows = _permute(jnp.repeat(flat, k, axis=0), order, back)
    with jax.named_scope("experts"):
        stacks = weights["experts"]
        gate = grouped_matmul(rows, stacks["gate"], group_sizes, layer)
        up = grouped_matmul(rows, stacks["up"], group_sizes, layer)
        out = grouped_matmul(jax.nn.silu(gate) * up, stacks["down"], group_sizes, layer)
    with jax.named_scope("combine"):
        per_token = _permute(out, back, order).reshape(-1, k, dim).astype(jnp.float32)
        mixed = (per_token * gates[..., None]).sum(1).astype(x.dtype)
    if "shared" in weights:
        with jax.named_scope("shared_expert"):
            mixed = mixed + gated_mlp(flat, weights["shared"])
    return mixed.reshape(batch, length, dim), RouterStats(group_sizes, z.sum())


@jax.custom_vjp
def _permute(x: Array, order: Array, back: Array) -> Array:
    """``x[order]``, whose gradient is a gather too: ``back`` is the inverse of ``order``."""
    return x[order]


_permute.defvjp(
    lambda x, order, back: (x[order], back), lambda back, given: (given[back], None, None)
)
