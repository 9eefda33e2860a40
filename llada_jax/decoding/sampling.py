"""From logits to a proposal: one token and its probability for every position."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


@no_type_check  # a pytree also holds tracers, shapes, shardings
class Proposal(flax.struct.PyTreeNode):
    """What the model would write.

    Attributes:
      tokens: proposed ids; ties of the argmax go to the lowest id.
      confidence: their probabilities: under the plain softmax when greedy, under the filtered and
        scaled distribution when drawn.
      entropy: of the plain softmax, in nats.
    """

    tokens: Int[Array, "B T"]
    confidence: Float[Array, "B T"]
    entropy: Float[Array, "B T"]


class Adjustment(NamedTuple):
    """What is done to the scores before a token is chosen.

    Attributes:
      banned: a token that is impossible at this position; -1 for none.
      penalised: a token whose score is lowered at this position; -1 for none.
      penalty: by how much.
    """

    banned: Int[Array, "B T"]
    penalised: Int[Array, "B T"]
    penalty: Float[Array, "B T"]

    @classmethod
    def of(
        cls,
        tokens: Int[Array, "B T"],
        mask_token_id: int,
        ban_mask: Bool[Array, " B"],
        penalty: Float[Array, " B"],
    ) -> Adjustment:
        """Bans the mask token, and penalises the token that stands one position before.

        The penalty (SGLang's ``penalty_lambda``) works inside the block; its first position has
        no neighbour.
        """
        before = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
        banned = jnp.broadcast_to(jnp.where(ban_mask, mask_token_id, -1)[:, None], tokens.shape)
        return cls(banned, before, jnp.broadcast_to(penalty[:, None], tokens.shape))

    def apply(self, logits: Float[Array, "B T V"]) -> Float[Array, "B T V"]:
        """The adjusted scores."""
        vocabulary = jnp.arange(logits.shape[-1])
        lowered = self.penalty[..., None] * (vocabulary == self.penalised[..., None])
        return jnp.where(vocabulary == self.banned[..., None], -jnp.inf, logits - lowered)


def filter_logits(
    logits: Float[Array, "B T V"],
    top_k: Int[Array, " B"],
    top_p: Float[Array, " B"],
    min_p: Float[Array, " B"],
) -> Float[Array, "B T V"]:
    """Keeps the top k (with ties), then the nucleus of mass p, then what min-p leaves.

    The nucleus ends with the token that carries the cumulative probability above ``top_p``; tokens
    as likely as its last one stay too. Others get ``-inf``.

    Args:
      logits: scaled scores.
      top_k: 0 for off. top_p: 1 for off. min_p: 0 for off; relative to the most likely token.
    """
    falling = -jnp.sort(-logits, axis=-1)
    last = jnp.where(top_k > 0, jnp.minimum(top_k, logits.shape[-1]), logits.shape[-1]) - 1
    smallest = jnp.take_along_axis(falling, last[:, None, None], axis=-1)
    falling = jnp.where(falling >= smallest, falling, -jnp.inf)
    before = jnp.cumsum(jax.nn.softmax(falling, axis=-1), axis=-1)
    before = jnp.pad(before[..., :-1], ((0, 0), (0, 0), (1, 0)))  # mass ahead of each token
    nucleus = (before <= top_p[:, None, None]) & (falling > -jnp.inf)
    smallest = jnp.where(nucleus, falling, jnp.inf).min(-1, keepdims=True)
    floor = logits.max(-1, keepdims=True) + jnp.log(min_p)[:, None, None]
    return jnp.where(logits >= jnp.maximum(smallest, floor), logits, -jnp.inf)


def draw(
    greedy: Proposal,
    logits: Callable[[], Float[Array, "B T V"]],
    keys: Key[Array, " B"],
    temperature: Float[Array, " B"],
    top_k: Int[Array, " B"],
    top_p: Float[Array, " B"],
    min_p: Float[Array, " B"],
) -> Proposal:
    """Replaces the proposals of rows whose ``temperature`` is not 0 by draws.

    Each row draws with its own key, so its result does not depend on the batch. A batch that is
    greedy throughout computes neither the draws nor ``logits()`` at run time.
    """

    def sample(_) -> tuple[Array, Array]:
        warm = temperature > 0
        scaled = logits() / jnp.where(warm, temperature, 1.0)[:, None, None]
        filtering = ((top_k > 0) | (top_p < 1) | (min_p > 0)).any()
        scaled = jax.lax.cond(
            filtering, lambda s: filter_logits(s, top_k, top_p, min_p), lambda s: s, scaled
        )
        drawn = jax.vmap(jax.random.categorical)(keys, scaled)
        chosen = jnp.take_along_axis(scaled, drawn[..., None], axis=-1)[..., 0]
        probability = jnp.exp(chosen - jax.nn.logsumexp(scaled, axis=-1))
        warm = warm[:, None]
        return (
            jnp.where(warm, drawn, greedy.tokens),
            jnp.where(warm, probability, greedy.confidence),
        )

    tokens, confidence = jax.lax.cond(
        (temperature > 0).any(), sample, lambda _: (greedy.tokens, greedy.confidence), None
    )
    return greedy.replace(tokens=tokens, confidence=confidence)
