"""The decision of a step: which masked positions are filled, which tokens are rewritten.

With proposals v and their probabilities p, the 2.1 report (equations 1 to 3) defines
``Γ = {i : x_i = MASK, p_i > τ_mask}`` and ``Δ = {i : x_i ≠ v_i, p_i > τ_edit}`` and writes v at
both. The released code adds: at least some positions are filled in each step, Δ holds no masked
position, and prompt positions are in neither. Comparisons are strict, ties go to the lower index.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def mask_to_token(
    masked: Bool[Array, "B C"],
    confidence: Float[Array, "B C"],
    threshold: Float[Array, " B"],
    minimum: Int[Array, " B"],
) -> Bool[Array, "B C"]:
    """Γ: masked positions to fill.

    Those above the threshold, if they are at least ``minimum``; otherwise the ``minimum`` most
    confident ones (or all, if fewer are masked).
    """
    above = masked & (confidence > threshold[:, None])
    enough = above.sum(-1, keepdims=True) >= minimum[:, None]
    return jnp.where(enough, above, masked & (_rank(confidence, masked) < minimum[:, None]))


def _rank(confidence: Float[Array, "B C"], among: Bool[Array, "B C"]) -> Int[Array, "B C"]:
    """How many positions of ``among`` are better: larger, or equal and further left."""
    index = jnp.arange(confidence.shape[1])
    mine, other = confidence[:, :, None], confidence[:, None, :]
    better = (other > mine) | ((other == mine) & (index[None, :] < index[:, None]))
    return (better & among[:, None, :]).sum(-1)


def token_to_token(
    editable: Bool[Array, "B C"],
    tokens: Int[Array, "B C"],
    proposal: Int[Array, "B C"],
    confidence: Float[Array, "B C"],
    threshold: Float[Array, " B"],
) -> Bool[Array, "B C"]:
    """Δ: editable positions (generated, not masked) whose token the model would replace."""
    return editable & (proposal != tokens) & (confidence > threshold[:, None])


def transfer_quota(
    step: Int[Array, " B"], steps: Int[Array, " B"], block_length: int
) -> Int[Array, " B"]:
    """2.0's schedule: ``block_length`` split over ``steps``, the remainder to the first ones.

    The quota counts the block's length, not its masks (so a boundary block may end early).
    ``steps`` must be positive.
    """
    return block_length // steps + (step < block_length % steps)
