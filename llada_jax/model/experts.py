"""The mixture of experts: route, then the experts of each token; dropless and exact."""

from __future__ import annotations

from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llada_jax.config import ModelConfig
from llada_jax.model.layers import gated_mlp
from llada_jax.model.router import choose_experts, router_logits
from pallas_kernels import Implementation
from pallas_kernels.expert_mlp import MAX_TOKENS, expert_mlp


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
    kernels: Implementation | None = None,
) -> tuple[Float[Array, "B T D"], RouterStats]:
    """Routed experts plus the shared expert, which is not scaled.

    Args:
      x: normed hidden states.
      weights: ``router``, ``experts``, and ``shared`` where there is one.
      config: the model.
      live: tokens that matter. The others reach no routed expert, so they cost nothing there and
        get an arbitrary finite result.
      layer: given when ``weights["experts"]`` holds all layers ``[L, E, ...]``; see
        ``pallas_kernels.expert_mlp``.
      kernels: which implementation to take for as many tokens as the kernel is made for.

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
        if live is not None:
            experts = jnp.where(live.reshape(-1, 1), experts, config.num_experts)
        load = jnp.bincount(experts.reshape(-1), length=config.num_experts + 1)[:-1]
    stacks = weights["experts"]
    mixed = expert_mlp(
        flat,
        stacks["gate"],
        stacks["up"],
        stacks["down"],
        experts,
        gates,
        layer=layer,
        implementation=kernels if len(flat) <= MAX_TOKENS else None,
    )
    if "shared" in weights:
        with jax.named_scope("shared_expert"):
            mixed = mixed + gated_mlp(flat, weights["shared"])
    return mixed.reshape(batch, length, dim), RouterStats(load, z.sum())
