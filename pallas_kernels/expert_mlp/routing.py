"""Which experts are touched, and by which tokens: the kernel's scalars."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Touched(NamedTuple):
    """Token-expert pairs sorted by expert; experts without tokens are left out.

    Attributes:
      count: touched experts.
      ids: the touched experts, rising; 0 beyond ``count``.
      begin: first pair of each touched expert, and the end of the last.
      tokens: token of each pair. Pairs of no expert come last; then padding, token 0.
      gates: weight of each pair.
    """

    count: Int[Array, ""]
    ids: Int[Array, " E"]
    begin: Int[Array, " E+1"]
    tokens: Int[Array, " pairs"]
    gates: Float[Array, " pairs"]


def sort_pairs(
    experts: Int[Array, "M k"], gates: Float[Array, "M k"], num_experts: int, padding: int
) -> Touched:
    """Sorts the pairs by expert; ids of ``num_experts`` and more, or below 0, are none."""
    k = experts.shape[1]
    assigned = experts.reshape(-1)
    assigned = jnp.where(assigned < 0, num_experts, jnp.minimum(assigned, num_experts))
    order = jnp.argsort(assigned, stable=True)
    sizes = jnp.bincount(assigned, length=num_experts + 1)[:num_experts]
    used = sizes > 0
    ends = jnp.cumsum(sizes)
    slot = jnp.where(used, jnp.cumsum(used) - 1, num_experts)  # place among the touched
    ids = jnp.zeros(num_experts, jnp.int32)
    ids = ids.at[slot].set(jnp.arange(num_experts, dtype=jnp.int32), mode="drop")
    begin = jnp.zeros(num_experts + 1, jnp.int32).at[slot + 1].set(ends, mode="drop")
    return Touched(
        used.sum().astype(jnp.int32),
        ids,
        begin,
        jnp.pad((order // k).astype(jnp.int32), (0, padding)),
        jnp.pad(gates.reshape(-1)[order].astype(jnp.float32), (0, padding)),
    )
