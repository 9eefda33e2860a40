"""What is remembered of the scores seen so far, and how two such memories become one.

The scores of a position are cut into parts (lanes of a vector register, tiles, halves of the
vocabulary, devices). Each part keeps six numbers; ``merge`` joins them and ``finish`` turns the
last ones into the result. Everything is relative to the part's own maximum, so nothing overflows
and the most likely token's own term is exactly 1.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Stands for -inf: differences of two of them are 0 instead of NaN. Lower scores count as -inf.
LOWEST = -1e30
# Id of a part that has no (second) token; ids travel as float32, which is exact below 2 ** 24.
NO_TOKEN = float(1 << 24)


class HeadResult(NamedTuple):
    """What a position's scores say.

    Attributes:
      token: the argmax; ties go to the lowest id.
      probability: softmax probability of ``token``.
      logsumexp: of the scores.
      runner_up: the second best token; of equal ones the lowest id. A token equal to the best is
        the runner-up. -1 if no other token has a score above -inf.
      runner_up_probability: 0 where ``runner_up`` is -1.
      entropy: of the softmax, in nats.
    """

    token: Int[Array, "*batch"]
    probability: Float[Array, "*batch"]
    logsumexp: Float[Array, "*batch"]
    runner_up: Int[Array, "*batch"]
    runner_up_probability: Float[Array, "*batch"]
    entropy: Float[Array, "*batch"]


class Statistics(NamedTuple):
    """Of some of a position's scores ``s``; float32 arrays of one shape.

    Attributes:
      maximum: the largest score, at least ``LOWEST``.
      second: the second largest.
      token: id of the largest, the lowest such id; ``NO_TOKEN`` if all are -inf.
      runner_up: id of the second largest, the lowest such id, but for ``token``.
      total: sum of ``exp(s - maximum)``.
      weighted: sum of ``exp(s - maximum) * (s - maximum)``.
    """

    maximum: Float[Array, "*parts"]
    second: Float[Array, "*parts"]
    token: Float[Array, "*parts"]
    runner_up: Float[Array, "*parts"]
    total: Float[Array, "*parts"]
    weighted: Float[Array, "*parts"]


def merge(parts: Statistics, axis: int, keepdims: bool = False) -> Statistics:
    """One memory of all the parts along ``axis``; plain enough to run inside a kernel too."""
    maximum = parts.maximum.max(axis, keepdims=True)
    is_best = parts.maximum == maximum
    token = jnp.where(is_best, parts.token, NO_TOKEN).min(axis, keepdims=True)
    # The runner-up is the winning part's second or another part's best. Parts without a token
    # share the id NO_TOKEN, and then have no second either.
    won = parts.token == token
    candidate = jnp.where(won, parts.second, parts.maximum)
    candidate_id = jnp.where(won, parts.runner_up, parts.token)
    second = candidate.max(axis, keepdims=True)
    runner_up = jnp.where(candidate == second, candidate_id, NO_TOKEN).min(axis, keepdims=True)
    below = parts.maximum - maximum
    share = jnp.exp(below)
    # The best part's sum is 1 or more: many small sums, added to it one by one, would be lost.
    scaled = parts.total * share
    rest = jnp.where(won, 0.0, scaled).sum(axis, keepdims=True)
    total = jnp.where(won, scaled, 0.0).sum(axis, keepdims=True) + rest
    weighted = ((parts.weighted + parts.total * below) * share).sum(axis, keepdims=True)
    merged = Statistics(maximum, second, token, runner_up, total, weighted)
    return merged if keepdims else Statistics(*(x.squeeze(axis) for x in merged))


def of_scores(scores: Float[Array, "*batch V"], first: Int[Array, ""] | int = 0) -> Statistics:
    """Of the last axis; its ids count from ``first``. NaN-free scores, -inf allowed."""
    scores = jnp.maximum(scores, LOWEST)
    column = jnp.arange(scores.shape[-1])
    best = jnp.argmax(scores, -1)
    maximum = scores.max(-1)
    others = jnp.where(column == best[..., None], LOWEST, scores)
    below = scores - maximum[..., None]
    odds = jnp.exp(below)
    second = others.max(-1)

    def name(value: Array, index: Array) -> Array:
        return jnp.where(value > LOWEST, (first + index).astype(jnp.float32), NO_TOKEN)

    return Statistics(
        maximum,
        second,
        name(maximum, best),
        name(second, jnp.argmax(others, -1)),
        odds.sum(-1),
        (odds * below).sum(-1),
    )


def finish(memory: Statistics) -> HeadResult:
    """The result. Where every score is -inf (or NaN): token 0, and NaN for its probability."""
    some, two = memory.token < NO_TOKEN, memory.runner_up < NO_TOKEN
    total = jnp.where(some, memory.total, jnp.nan)
    return HeadResult(
        token=jnp.where(some, memory.token, 0).astype(jnp.int32),
        probability=1 / total,
        logsumexp=jnp.where(some, memory.maximum + jnp.log(memory.total), -jnp.inf),
        runner_up=jnp.where(two, memory.runner_up, -1).astype(jnp.int32),
        runner_up_probability=jnp.where(
            two, jnp.exp(memory.second - memory.maximum) / total, 0 * total
        ),
        entropy=jnp.log(total) - memory.weighted / total,
    )
