"""The forward process: which tokens are masked, which replaced, and what a draft makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llada_jax.config import ModelConfig
from llada_jax.diffusion.config import DiffusionConfig


def span_starts(positions: Int[Array, "B L"], length: int | None) -> Int[Array, "B L"]:
    """Index in the row of the first token of each token's block.

    Args:
      positions: positions within the documents.
      length: tokens a block; ``None``: the whole document.
    """
    index = jnp.arange(positions.shape[1])
    return index - (positions if length is None else positions % length)


def stratified_uniform(
    key: Array, starts: Int[Array, "B L"], document: Int[Array, "B L"]
) -> Float[Array, "B L"]:
    """One number in [0, 1) for every span, spread evenly over all spans of the batch.

    With J spans, each interval ``[j/J, (j+1)/J)`` holds exactly one of them (BD3-LM's antithetic
    sampling). Tokens of a span share its number.

    Args:
      key: randomness.
      starts: ``span_starts``.
      document: 0 for padding, whose spans are not counted.
    """
    order_key, jitter_key = jax.random.split(key)
    index = jnp.arange(starts.shape[1])
    first = ((starts == index) & (document > 0)).reshape(-1)
    shuffled = jnp.argsort(jnp.where(first, jax.random.uniform(order_key, first.shape), 2.0))
    rank = jnp.zeros_like(shuffled).at[shuffled].set(jnp.arange(len(shuffled)))
    jitter = jax.random.uniform(jitter_key, first.shape)
    spread = (rank + jitter) / jnp.maximum(first.sum(), 1)
    spread = jnp.minimum(spread, jnp.float32(1) - jnp.finfo(jnp.float32).epsneg)
    return jnp.take_along_axis(spread.reshape(starts.shape), starts, axis=1)


def mask_rates(
    key: Array,
    positions: Int[Array, "B L"],
    document: Int[Array, "B L"],
    config: DiffusionConfig,
) -> Float[Array, "B L"]:
    """The mask rate t of each token's block or document."""
    length = config.block_size if config.noise_level == "block" else None
    spread = stratified_uniform(key, span_starts(positions, length), document)
    low, high = config.noise_range_low, config.noise_range_high
    return low + (high - low) * spread


def random_tokens(
    key: Array, shape: tuple[int, ...], vocab_size: int, special: Sequence[int]
) -> Int[Array, ...]:
    """Tokens drawn uniformly from the vocabulary without ``special``."""
    special = sorted(set(special))
    drawn = jax.random.randint(key, shape, 0, vocab_size - len(special))
    for token in special:  # each one that is passed moves the rest up
        drawn = drawn + (drawn >= token)
    return drawn


@no_type_check  # a pytree also holds tracers and shapes
class Noise(flax.struct.PyTreeNode):
    """All the randomness of a batch, the batch first: it can be cut into micro-batches.

    Attributes:
      noisy: x_t of round 0, N copies.
      rates: the mask rate of each copy.
      fill_above: for each later round, the threshold τ_mask of each token's block.
      edit_above: the same for τ_edit; above 1 where the block is not edited.
      row_keys: a key a row, for the embedding noise.
    """

    noisy: Int[Array, "B N L"]
    rates: Float[Array, "B N L"]
    fill_above: Float[Array, "B R N L"]
    edit_above: Float[Array, "B R N L"]
    row_keys: Array


def draw_noise(
    key: Array, batch: Mapping[str, Array], model: ModelConfig, config: DiffusionConfig
) -> Noise:
    """Draws a batch's noise. Equal keys give equal noise, whatever the sharding.

    Round 0 masks tokens, and replaces some of those left visible. A complementary copy masks
    exactly the supervised tokens that the first left visible, so its rate is ``1 - t``.

    Args:
      key: randomness.
      batch: ``tokens``, ``positions``, ``document`` (0 is padding) and ``supervised``, each
        ``[B, L]``.
      model: its vocabulary and special tokens; no replacement is one of these.
      config: the objective.
    """
    rate_key, mask_key, edit_key, token_key, draft_key, row_key = jax.random.split(key, 6)
    tokens, positions, document = batch["tokens"], batch["positions"], batch["document"]
    supervised = batch["supervised"] & (document > 0)
    rates = mask_rates(rate_key, positions, document, config)
    masked = supervised & (jax.random.uniform(mask_key, tokens.shape) < rates)
    if config.complementary:
        masked = jnp.stack([masked, supervised & ~masked], axis=1)
        rates = jnp.stack([rates, 1 - rates], axis=1)
    else:
        masked, rates = masked[:, None], rates[:, None]
    noisy = jnp.broadcast_to(tokens[:, None], masked.shape)
    if config.random_edit_rate:
        edited = jax.random.uniform(edit_key, masked.shape) < config.random_edit_rate
        special = (model.mask_token_id, model.pad_token_id, *model.eos_token_ids)
        other = random_tokens(token_key, masked.shape, model.vocab_size, special)
        noisy = jnp.where(edited & supervised[:, None], other, noisy)
    noisy = jnp.where(masked, model.mask_token_id, noisy)

    batch_size, copies, length = masked.shape
    shape = (batch_size, config.rounds - 1, copies, length)
    starts = span_starts(positions, config.block_size)
    starts = jnp.broadcast_to(starts[:, None, None], shape)

    def of_block(key: Array, low: float, high: float) -> Array:
        drawn = jax.random.uniform(key, shape, minval=low, maxval=high)
        return jnp.take_along_axis(drawn, starts, axis=-1)

    fill_key, threshold_key, which_key = jax.random.split(draft_key, 3)
    edits = of_block(which_key, 0.0, 1.0) < config.draft_edit_rate
    edit_above = of_block(threshold_key, 0.0, config.draft_threshold_high)
    return Noise(
        noisy,
        rates,
        of_block(fill_key, config.draft_threshold_low, config.draft_threshold_high),
        jnp.where(edits, edit_above, 2.0),
        jax.random.split(row_key, batch_size),
    )


def write_draft(
    noisy: Int[Array, "B N L"],
    best: Int[Array, "B N L"],
    confidence: Float[Array, "B N L"],
    fill_above: Float[Array, "B N L"],
    edit_above: Float[Array, "B N L"],
    mask_token_id: int,
) -> Int[Array, "B N L"]:
    """The next round's draft, by the decoder's rules Γ (fill) and Δ (edit).

    ``decoding/rules.py`` has them for one threshold a row, and with a minimum of fills; here every
    token brings the threshold of its block, and no fill is forced.

    Args:
      noisy: the draft so far.
      best: the model's token at each position (never the mask).
      confidence: its probability; 0 where the token must not change.
      fill_above, edit_above: thresholds.
      mask_token_id: of the model.
    """
    masked = noisy == mask_token_id
    change = confidence > jnp.where(masked, fill_above, edit_above)
    return jnp.where(change, best, noisy)
