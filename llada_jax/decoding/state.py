"""The state of the decoding loop."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from llada_jax.decoding.params import SamplingParams
from llada_jax.model import KVCache


class Phase(enum.IntEnum):
    """What a row's next forward pass is for."""

    DONE = 0  # nothing; the row waits to be taken out
    DENOISE = 1  # fill and edit the active block
    COMMIT = 2  # store the keys and values of the finished block
    EDIT_WINDOW = 3  # edit the last K blocks, attending fully among them
    REWRITE_WINDOW = 4  # store their keys and values anew, block-causally


@no_type_check  # a pytree also holds tracers, shapes, shardings
class RowSettings(flax.struct.PyTreeNode):
    """``SamplingParams`` of each row, as arrays; see there for the meaning.

    Off is ``inf`` for ``editing_threshold``, 0 for ``steps``, ``top_k`` and ``min_p``, 1 for
    ``top_p``, negative for ``entropy_quantile``; ``stop_tokens`` is padded with -1.
    """

    threshold: Float[Array, " B"]
    editing_threshold: Float[Array, " B"]
    max_post_steps: Int[Array, " B"]
    num_to_transfer: Int[Array, " B"]
    steps: Int[Array, " B"]
    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    penalty_lambda: Float[Array, " B"]
    ban_mask: Bool[Array, " B"]
    eos_early_stop: Bool[Array, " B"]
    window: Int[Array, " B"]
    window_steps: Int[Array, " B"]
    entropy_quantile: Float[Array, " B"]
    stop_tokens: Int[Array, "B n"]
    key: Key[Array, " B"]

    @classmethod
    def from_params(
        cls,
        params: Sequence[SamplingParams],
        eos_token_ids: Sequence[int],
        seeds: Sequence[int],
        stop_slots: int = 8,
    ) -> RowSettings:
        """Gathers the settings of a batch.

        Args:
          params: one a row; equal ``block_length``.
          eos_token_ids: the model's end-of-text tokens.
          seeds: one a row, used where the row draws.
          stop_slots: stop tokens that a row can have; raised to the next power of two if a row
            needs more. It is part of the compiled shape.
        """

        def column(values, dtype) -> Array:
            return jnp.asarray(np.array(list(values), dtype))

        stops = [[*([] if p.ignore_eos else eos_token_ids), *p.stop_token_ids] for p in params]
        most = max(map(len, stops))
        width = stop_slots if most <= stop_slots else 1 << (most - 1).bit_length()
        real, whole, truth = np.float32, np.int32, np.bool_
        return cls(
            threshold=column((p.threshold for p in params), real),
            editing_threshold=column(
                (np.inf if p.editing_threshold is None else p.editing_threshold for p in params),
                real,
            ),
            max_post_steps=column((p.max_post_steps for p in params), whole),
            num_to_transfer=column((p.num_to_transfer for p in params), whole),
            steps=column((min(p.steps, p.max_tokens) if p.steps else 0 for p in params), whole),
            temperature=column((p.temperature for p in params), real),
            top_k=column((min(p.top_k or 0, 2**31 - 1) for p in params), whole),
            top_p=column((1.0 if p.top_p is None else p.top_p for p in params), real),
            min_p=column((p.min_p or 0.0 for p in params), real),
            penalty_lambda=column((p.penalty_lambda for p in params), real),
            ban_mask=column((p.ban_mask for p in params), truth),
            eos_early_stop=column((p.eos_early_stop for p in params), truth),
            window=column((p.multi_block_window for p in params), whole),
            window_steps=column((p.multi_block_steps for p in params), whole),
            entropy_quantile=column(
                (
                    -1.0
                    if p.multi_block_entropy_quantile is None
                    else p.multi_block_entropy_quantile
                    for p in params
                ),
                real,
            ),
            stop_tokens=column((s + [-1] * (width - len(s)) for s in stops), whole),
            key=jax.vmap(jax.random.key)(column(seeds, np.uint32)),
        )


@no_type_check  # a pytree also holds tracers, shapes, shardings
class DecodeState(flax.struct.PyTreeNode):
    """Everything that a row is, between two forward passes. S is a multiple of the block length.

    A row's canvas is its prompt, then masks up to ``end``. Invariants, for a row not DONE:
    tokens before ``position`` are committed (they change only while an editing window is open);
    cache entries before ``position`` come from forwards over those very tokens; prompt positions
    never change.
    """

    tokens: Int[Array, "B S"]
    confidence: Float[Array, "B S"]  # probability of each token when it was last written; 1: prompt
    prompt_length: Int[Array, " B"]
    end: Int[Array, " B"]  # first position after the canvas; a multiple of C
    position: Int[Array, " B"]  # start of the active block; a multiple of C
    phase: Int[Array, " B"]  # a Phase
    step: Int[Array, " B"]  # denoising forwards that the active block has had
    post_step: Int[Array, " B"]  # those of them that began without a mask
    stale: Bool[Array, " B"]  # the active block's cache entries predate its last change
    window_step: Int[Array, " B"]  # editing passes over the open window so far
    changed_from: Int[Array, " B"]  # first position that the open window changed; S: none
    block_entropy: Float[Array, "B blocks"]  # mean over generated tokens, at the block's end
    num_forwards: Int[Array, " B"]
    num_commit_forwards: Int[Array, " B"]
    num_edits: Int[Array, " B"]  # tokens rewritten, in blocks and windows
    settings: RowSettings
    cache: KVCache

    @property
    def done(self) -> Bool[Array, " B"]:
        """Rows that need no further forward."""
        return self.phase == Phase.DONE


def take_span(array: Array, start: Int[Array, " B"], width: int) -> Array:
    """``array[b, start[b] : start[b] + width]`` for every row: ``[B, width]``."""
    return jax.vmap(lambda row, at: jax.lax.dynamic_slice(row, (at,), (width,)))(array, start)


def put_span(array: Array, span: Array, start: Int[Array, " B"]) -> Array:
    """The inverse of ``take_span``: stores ``span [B, width]`` at ``start`` of every row."""
    return jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))(
        array, span.astype(array.dtype), start
    )
