"""A denoiser without a network: logits are rows of a table, chosen by a hash of what is visible.

The hash is computed in small whole numbers, so cached, uncached, batched and numpy evaluation
agree to the bit. Its "keys" are the tokens' own values: a cache entry that predates a change of
its token changes every later choice.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from llada_jax.decoding.sampling import Proposal
from llada_jax.model import KVCache
from pallas_kernels import WindowMask

VOCABULARY = 24
MASK, EOS = 23, 22
ROWS = 509


def make_table(seed: int, sharpness: float) -> np.ndarray:
    """Logits ``[ROWS, V]``; a larger ``sharpness`` makes more confident proposals.

    Few different rows: confidences then tie exactly or differ by far more than rounding, so that
    numpy and XLA rank them alike.
    """
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(61, VOCABULARY)) * rng.gamma(2.0, sharpness, size=(61, 1))
    rows[:, EOS] -= 2.0
    return np.clip(rows, -8, 8).astype(np.float32)[rng.integers(61, size=ROWS)]


def value(tokens, positions):
    """What a token contributes to the hash of those who see it."""
    return (tokens * 31 + positions * 17) % 97


def table_row(context, tokens, positions, coupling):
    """The row for a position that sees ``context``; ``coupling`` 0 ignores its own token."""
    return (context * 7 + positions * 13 + coupling * tokens * 5) % ROWS


def propose_greedily(logits):
    """The argmax and its softmax probability."""
    # Relative to the maximum: the probability of the argmax then keeps float32's full precision.
    below = logits - logits.max(-1, keepdims=True)
    odds = jnp.exp(below)
    total = odds.sum(-1)
    # A banned logit is -inf: 0 * -inf must count as 0.
    entropy = jnp.log(total) - jnp.where(odds > 0, odds * below, 0.0).sum(-1) / total
    return Proposal(jnp.argmax(logits, axis=-1), 1 / total, entropy)


@dataclasses.dataclass(frozen=True)
class ToyDenoiser:
    """A ``Denoiser`` whose params are ``{"table", "coupling"}``.

    ``coupling`` scales how much a block's own tokens count: 0 settles at once, 1 oscillates.
    """

    @property
    def mask_token_id(self) -> int:
        return MASK

    def init_cache(self, batch, length):
        return KVCache(*(jnp.zeros((1, batch, 1, length, 1)) for _ in range(2)))

    def forward(self, params, tokens, positions, mask, cache, cache_length, live):
        values = value(tokens, positions).astype(jnp.float32)
        cached = jnp.arange(cache.keys.shape[3]) < cache_length[:, None]
        prefix = jnp.where(cached, cache.keys[0, :, 0, :, 0], 0).sum(-1)
        if mask is None:
            mask = WindowMask()
        mask = mask.dense(tokens.shape[1])
        seen = (mask * values[:, None, :]).sum(-1)
        context = (prefix[:, None] + params["coupling"] * seen).astype(jnp.int32)
        row = table_row(context, tokens, positions, params["coupling"])
        fresh = values[None, :, None, :, None]
        return row[..., None].astype(jnp.float32), KVCache(fresh, fresh)

    def propose(self, params, hidden, adjustment):
        return propose_greedily(adjustment.apply(self.logits(params, hidden)))

    def logits(self, params, hidden):
        return params["table"][hidden[..., 0].astype(jnp.int32)]


def toy_logits(params, canvas: np.ndarray, visible: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """The same, uncached, for one row, in numpy.

    Args:
      params: as for ``ToyDenoiser``.
      canvas: all tokens fed, ``[T]``.
      visible: who sees whom, ``[T, T]``.
      inside: the pairs that count as one forward's own tokens (scaled by the coupling), ``[T, T]``.
    """
    positions = np.arange(len(canvas))
    values = value(canvas, positions)
    coupling = int(params["coupling"])
    context = ((visible & ~inside) * values).sum(1) + coupling * ((visible & inside) * values).sum(
        1
    )
    return np.asarray(params["table"])[table_row(context, canvas, positions, coupling)]
