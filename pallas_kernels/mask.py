"""Who may look at whom: the attention masks of block diffusion, as predicates.

A predicate takes broadcastable integer arrays of query and key coordinates and returns booleans,
so that a dense reference, a kernel and a test all share it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def block_causal(
    query: Int[Array, "*q"], key: Int[Array, "*k"], block_length: int
) -> Bool[Array, ...]:
    """True where the key's block is not later than the query's (spec: 0/-inf mask, tril of blocks).

    With ``block_length = 2`` and six positions (rows are queries)::

        1 1 . . . .
        1 1 . . . .
        1 1 1 1 . .
        1 1 1 1 . .
        1 1 1 1 1 1
        1 1 1 1 1 1

    Args:
      query: absolute positions of the queries.
      key: absolute positions of the keys, broadcastable against ``query``.
      block_length: tokens a block, a positive integer.
    """
    return key // block_length <= query // block_length


def block_diffusion(
    query: Int[Array, "*q"], key: Int[Array, "*k"], length: int, block_length: int
) -> Bool[Array, ...]:
    """The training mask over ``[x_t ; x_0]``, both of ``length`` tokens (2.0 report, equation 3).

    Noisy queries see their own noisy block and strictly earlier clean blocks; clean queries are
    block-causal among themselves and never see the noisy half. With ``length = 4`` and
    ``block_length = 2``::

               x_t       x_0
             1 1 . . | . . . .
        x_t  1 1 . . | . . . .
             . . 1 1 | 1 1 . .
             . . 1 1 | 1 1 . .
             --------+--------
             . . . . | 1 1 . .
        x_0  . . . . | 1 1 . .
             . . . . | 1 1 1 1
             . . . . | 1 1 1 1

    Args:
      query: indices of the queries into the ``2 * length`` tokens.
      key: indices of the keys, broadcastable against ``query``.
      length: tokens of one half.
      block_length: tokens a block.
    """
    query_clean, key_clean = query >= length, key >= length
    query_block = (query - length * query_clean) // block_length
    key_block = (key - length * key_clean) // block_length
    within_noisy = ~query_clean & ~key_clean & (query_block == key_block)
    noisy_to_clean = ~query_clean & key_clean & (query_block > key_block)
    within_clean = query_clean & key_clean & (query_block >= key_block)
    return within_noisy | noisy_to_clean | within_clean


def block_diffusion_packed(
    query: tuple[Int[Array, "*q"], Int[Array, "*q"], Int[Array, "*q"]],
    key: tuple[Int[Array, "*k"], Int[Array, "*k"], Int[Array, "*k"]],
) -> Bool[Array, ...]:
    """``block_diffusion`` for several noisy copies and several documents in a row.

    A token's coordinates are ``(copy, block, document)``: ``copy`` 0 is the clean one, 1, 2, … are
    noisy; ``block`` counts within the document. Clean tokens never see noisy ones, noisy copies
    never see each other, documents never see each other. With two copies of four tokens and
    ``block_length = 2``::

               x_t       x_t'      x_0
        x_t  1 1 . . | . . . . | . . . .
             1 1 . . | . . . . | . . . .
             . . 1 1 | . . . . | 1 1 . .
             . . 1 1 | . . . . | 1 1 . .
        x_t' . . . . | 1 1 . . | . . . .
             . . . . | 1 1 . . | . . . .
             . . . . | . . 1 1 | 1 1 . .
             . . . . | . . 1 1 | 1 1 . .
        x_0  . . . . | . . . . | 1 1 . .
             . . . . | . . . . | 1 1 . .
             . . . . | . . . . | 1 1 1 1
             . . . . | . . . . | 1 1 1 1

    Args:
      query: coordinates of the queries.
      key: coordinates of the keys, broadcastable against the queries'.
    """
    query_copy, query_block, query_document = query
    key_copy, key_block, key_document = key
    own_block = (query_copy == key_copy) & (query_block == key_block)
    clean_before = (key_copy == 0) & (key_block < query_block)
    return (query_document == key_document) & (own_block | clean_before)


@no_type_check  # a pytree also holds tracers, shapes, shardings
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("length", "causal"),
    meta_fields=("block_length",),
)
@dataclasses.dataclass(frozen=True)
class WindowMask:
    """Who sees whom among the fresh tokens of a decoding step; the cache is seen by all of them.

    The first fresh token begins a block. A row of six tokens with ``block_length = 2`` and
    ``length = 4``, not causal and causal::

        1 1 1 1 . .      1 1 . . . .
        1 1 1 1 . .      1 1 . . . .
        1 1 1 1 . .      1 1 1 1 . .
        1 1 1 1 . .      1 1 1 1 . .
        1 1 1 1 . .      1 1 1 1 . .
        1 1 1 1 . .      1 1 1 1 . .

    Attributes:
      length: ``Int[Array, "B"]``, fresh keys of each row that are seen, the first ones; all of
        them by default.
      causal: ``Bool[Array, "B"]``, rows whose fresh keys are seen block-causally; none by default.
      block_length: tokens a block; needed with ``causal``.
    """

    length: Int[Array, " B"] | None = None
    causal: Bool[Array, " B"] | None = None
    block_length: int | None = None

    def dense(self, width: int) -> Bool[Array, "#B T T"]:
        """The mask for ``width`` fresh tokens a row."""
        place = jnp.arange(width)
        seen = jnp.ones((1, width, width), bool)
        if self.length is not None:
            seen &= place < self.length[:, None, None]
        if self.causal is not None:
            if self.block_length is None:
                raise ValueError("a causal WindowMask needs block_length")
            earlier = block_causal(place[:, None], place, self.block_length)
            seen = seen & (earlier | ~self.causal[:, None, None])
        return seen
