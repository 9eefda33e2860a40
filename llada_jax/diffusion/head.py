"""The language-model head in chunks: cross-entropy, entropy and predictions without ``[L, V]``.

The scores of a few hundred tokens exist at a time, forward and backward; the head runs only on
tokens that are needed.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llada_jax.model.layers import precision_of


class HeadStats(NamedTuple):
    """What the scores at each position say; 0 where they were not needed.

    Attributes:
      log_prob: log-probability of the label. Differentiable.
      entropy: entropy in nats at the given temperature. Differentiable.
      best: the most probable token.
      draft: the most probable token but for the banned one.
      confidence: the probability of ``draft`` when the banned token is impossible.
    """

    log_prob: Float[Array, "B L"]
    entropy: Float[Array, "B L"]
    best: Int[Array, "B L"]
    draft: Int[Array, "B L"]
    confidence: Float[Array, "B L"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def head_stats(
    hidden: Float[Array, "B L D"],
    kernel: Float[Array, "D V"],
    labels: Int[Array, "B L"],
    needed: Bool[Array, "B L"],
    banned: int,
    temperature: float = 1.0,
    chunk: int = 128,
    entropy_gradient: bool = True,
) -> HeadStats:
    """Runs the head over the needed positions.

    Args:
      hidden: final hidden states; the product runs in their dtype, the rest in float32.
      kernel: the head.
      labels: tokens to score.
      needed: positions to compute.
      banned: the token that a draft must not hold (the mask).
      temperature: divides the scores in ``entropy`` only.
      chunk: positions of a row computed at a time.
      entropy_gradient: whether ``entropy`` has a gradient; without it the backward pass is shorter.
    """
    return _forward(hidden, kernel, labels, needed, banned, temperature, chunk, entropy_gradient)[0]


class _Chunks:
    """The needed positions of every row, moved to the front and cut into chunks."""

    def __init__(self, needed: Array, chunk: int):
        length = needed.shape[1]
        self.chunk = min(chunk, length)
        total = -(-length // self.chunk) * self.chunk
        self.order = jnp.argsort(~needed, axis=1, stable=True)
        self.padded = jnp.pad(self.order, ((0, 0), (0, total - length)))
        self.rows = needed.sum(1)
        self.count = (self.rows.max() + self.chunk - 1) // self.chunk
        self.total, self.length = total, length

    def index(self, i: Array) -> tuple[Array, Array]:
        """Places of chunk i, and which of them are needed: both [B, chunk]."""
        places = jax.lax.dynamic_slice_in_dim(self.padded, i * self.chunk, self.chunk, axis=1)
        valid = i * self.chunk + jnp.arange(self.chunk) < self.rows[:, None]
        return places, valid

    def put(self, buffer: Array, values: Array, i: Array) -> Array:
        """Writes chunk i of a [B, total] buffer."""
        return jax.lax.dynamic_update_slice_in_dim(buffer, values, i * self.chunk, axis=1)

    def restore(self, buffer: Array) -> Array:
        """[B, total] in chunk order to [B, L] in the order of the row."""
        back = jnp.argsort(self.order, axis=1)
        return jnp.take_along_axis(buffer[:, : self.length], back, axis=1)


def _scores(hidden: Array, kernel: Array) -> Array:  # [B, c, V] float32
    product = jnp.einsum(
        "bcd,dv->bcv", hidden, kernel.astype(hidden.dtype), precision=precision_of(hidden.dtype)
    )
    return product.astype(jnp.float32)


def _forward(hidden, kernel, labels, needed, banned, temperature, chunk, entropy_gradient):
    chunks = _Chunks(needed, chunk)
    batch, dtype = len(hidden), jnp.float32

    def body(i: Array, buffers: HeadStats) -> HeadStats:
        places, valid = chunks.index(i)
        rows = jnp.take_along_axis(hidden, places[..., None], axis=1)
        scores = _scores(rows, kernel)
        label = jnp.take_along_axis(labels, places, axis=1)[..., None]
        of_label = jnp.take_along_axis(scores, label, axis=-1)[..., 0]
        log_prob = of_label - jax.nn.logsumexp(scores, axis=-1)
        log_p = jax.nn.log_softmax(scores / temperature, axis=-1)
        entropy = -(jnp.exp(log_p) * log_p).sum(-1)
        allowed = jnp.where(jnp.arange(scores.shape[-1]) == banned, -jnp.inf, scores)
        confidence = jnp.exp(allowed.max(-1) - jax.nn.logsumexp(allowed, axis=-1))
        new = HeadStats(log_prob, entropy, scores.argmax(-1), allowed.argmax(-1), confidence)
        return HeadStats(
            *(
                chunks.put(b, jnp.where(valid, n, 0).astype(b.dtype), i)
                for b, n in zip(buffers, new, strict=True)
            )
        )

    empty = HeadStats(
        *(
            jnp.zeros((batch, chunks.total), kind)
            for kind in (dtype, dtype, jnp.int32, jnp.int32, dtype)
        )
    )
    stats = jax.lax.fori_loop(0, chunks.count, body, empty)
    stats = HeadStats(*(chunks.restore(b) for b in stats))
    return stats, (hidden, kernel, labels, needed)


def _backward(banned, temperature, chunk, entropy_gradient, residuals, cotangent: HeadStats):
    hidden, kernel, labels, needed = residuals
    chunks = _Chunks(needed, chunk)
    vocabulary = jnp.arange(kernel.shape[1])

    def body(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        to_hidden, to_kernel = carry
        places, valid = chunks.index(i)
        take = functools.partial(jnp.take_along_axis, indices=places, axis=1)
        rows = jnp.take_along_axis(hidden, places[..., None], axis=1)
        scores = _scores(rows, kernel)
        of_log_prob = jnp.where(valid, take(cotangent.log_prob), 0)[..., None]
        hit = vocabulary == take(labels)[..., None]
        to_scores = of_log_prob * (hit - jax.nn.softmax(scores, axis=-1))
        if entropy_gradient:
            of_entropy = jnp.where(valid, take(cotangent.entropy), 0)[..., None]
            log_p = jax.nn.log_softmax(scores / temperature, axis=-1)
            p = jnp.exp(log_p)
            entropy = -(p * log_p).sum(-1, keepdims=True)
            to_scores = to_scores - of_entropy * p * (log_p + entropy) / temperature
        to_scores = to_scores.astype(hidden.dtype)
        product: Any = functools.partial(
            jnp.einsum, precision=precision_of(hidden.dtype), preferred_element_type=jnp.float32
        )
        to_rows = product("bcv,dv->bcd", to_scores, kernel.astype(hidden.dtype))
        to_hidden = jax.lax.dynamic_update_slice_in_dim(
            to_hidden, to_rows.astype(hidden.dtype), i * chunks.chunk, axis=1
        )
        return to_hidden, to_kernel + product("bcd,bcv->dv", rows, to_scores)

    start = (
        jnp.zeros((len(hidden), chunks.total, hidden.shape[2]), hidden.dtype),
        jnp.zeros(kernel.shape, jnp.float32),
    )
    to_hidden, to_kernel = jax.lax.fori_loop(0, chunks.count, body, start)
    back = jnp.argsort(chunks.order, axis=1)
    to_hidden = jnp.take_along_axis(to_hidden[:, : chunks.length], back[..., None], axis=1)
    return to_hidden, to_kernel.astype(kernel.dtype), None, None


head_stats.defvjp(_forward, _backward)
