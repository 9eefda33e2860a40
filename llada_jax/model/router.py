"""Which experts a token goes to: sigmoid scores, biased group-limited choice, unbiased weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llada_jax.config import ModelConfig


def router_logits(x: Float[Array, "M D"], kernel: Float[Array, "D E"]) -> Float[Array, "M E"]:
    """A token's affinity to each expert, always in float32."""
    return jnp.dot(
        x.astype(jnp.float32), kernel.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )


def choose_experts(
    logits: Float[Array, "M E"], expert_bias: Float[Array, " E"], config: ModelConfig
) -> tuple[Int[Array, "M k"], Float[Array, "M k"]]:
    """Chooses ``k = num_experts_per_tok`` experts a token.

    A group's score is the sum of its two best biased scores; experts of groups outside the best
    ``topk_group`` are not eligible. The bias takes part in the choice only. Ties go to the lower
    index.

    Returns:
      ``(experts, weights)``: ids in order of falling biased score, and sigmoid scores normalised
      over the chosen ones, times ``routed_scaling_factor``.
    """
    scores = jax.nn.sigmoid(logits)
    biased = jax.lax.stop_gradient(scores) + expert_bias.astype(jnp.float32)
    if config.n_group > 1:
        grouped = biased.reshape(len(biased), config.n_group, -1)  # [M, groups, E / groups]
        group_scores = jax.lax.top_k(grouped, 2)[0].sum(-1)
        kept = jax.lax.top_k(group_scores, config.topk_group)[1]
        eligible = jax.nn.one_hot(kept, config.n_group, dtype=bool).any(1)
        biased = jnp.where(eligible[..., None], grouped, -jnp.inf).reshape(biased.shape)
    experts = jax.lax.top_k(biased, config.num_experts_per_tok)[1]
    chosen = jnp.take_along_axis(scores, experts, axis=-1)
    weights = chosen / (chosen.sum(-1, keepdims=True) + 1e-20)
    return experts, weights * config.routed_scaling_factor


def route(
    x: Float[Array, "M D"],
    kernel: Float[Array, "D E"],
    expert_bias: Float[Array, " E"],
    config: ModelConfig,
) -> tuple[Int[Array, "M k"], Float[Array, "M k"]]:
    """``router_logits``, then ``choose_experts``."""
    return choose_experts(router_logits(x, kernel), expert_bias, config)
