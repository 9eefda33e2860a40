"""The obvious confidence head: all scores at once. The oracle of the tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.confidence_head.statistics import HeadResult
from pallas_kernels.quantized import Matrix, QuantizedMatrix, dequantize


def confidence_head_reference(
    hidden: Float[Array, "*batch D"],
    head: Matrix,
    *,
    banned: Int[Array, "*batch"] | None = None,
    penalised: Int[Array, "*batch"] | None = None,
    penalty: Float[Array, "*batch"] | None = None,
    transposed: bool = False,
) -> HeadResult:
    """See ``confidence_head``; float32 throughout."""
    if isinstance(head, QuantizedMatrix):
        head = dequantize(head)
    head = head.T if transposed else head
    scores = jnp.matmul(
        hidden.astype(jnp.float32), head.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    column = jnp.arange(scores.shape[-1])
    if penalised is not None and penalty is not None:
        lowered = scores - penalty[..., None]
        scores = jnp.where(column == penalised[..., None], lowered, scores)
    if banned is not None:
        scores = jnp.where(column == banned[..., None], -jnp.inf, scores)
    probabilities = jax.nn.softmax(scores, -1)
    token = jnp.argmax(scores, -1)
    others = jnp.where(column == token[..., None], -jnp.inf, scores)
    runner_up = jnp.argmax(others, -1)
    exists = others.max(-1) > -jnp.inf
    logarithms = jnp.log(jnp.where(probabilities > 0, probabilities, 1))
    total = jnp.exp(scores - scores.max(-1, keepdims=True)).sum(-1)
    second = jnp.take_along_axis(probabilities, runner_up[..., None], -1)[..., 0]
    return HeadResult(
        token=token,
        probability=1 / total,
        logsumexp=jax.nn.logsumexp(scores, -1),
        runner_up=jnp.where(exists, runner_up, -1),
        runner_up_probability=jnp.where(exists, second, 0.0 * total),
        entropy=-(probabilities * logarithms).sum(-1),
    )
