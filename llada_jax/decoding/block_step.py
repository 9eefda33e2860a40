"""One forward pass over the active block of every row, and what it writes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from llada_jax.decoding.denoiser import Denoiser
from llada_jax.decoding.rules import mask_to_token, token_to_token, transfer_quota
from llada_jax.decoding.sampling import Adjustment, Proposal, draw
from llada_jax.decoding.state import DecodeState, Phase, put_span, take_span
from llada_jax.decoding.transitions import advance, finish_block, is_stop_token, uses_quota_rule
from llada_jax.model import write_cache


def block_step(
    denoiser: Denoiser, params: Any, state: DecodeState, block_length: int, max_window: int
) -> tuple[DecodeState, Proposal]:
    """Runs rows in DENOISE and COMMIT one forward further; the others stay as they are.

    The forward's keys and values are stored at the block's place each time. They are final when
    the forward's input was: so a block whose last forward changed nothing needs no COMMIT.

    Returns:
      The next state, and the model's proposal for every position of the blocks.
    """
    denoise, commit = state.phase == Phase.DENOISE, state.phase == Phase.COMMIT
    active = denoise | commit
    settings = state.settings
    tokens = take_span(state.tokens, state.position, block_length)  # [B, C]
    positions = state.position[:, None] + jnp.arange(block_length)
    live = jnp.broadcast_to(active[:, None], tokens.shape)
    with jax.named_scope("forward"):
        # A row that waits must not make the others read as far as it has come.
        prefix = jnp.where(active, state.position, 0)
        hidden, fresh = denoiser.forward(params, tokens, positions, None, state.cache, prefix, live)
    cache = write_cache(state.cache, fresh, state.position, live)
    with jax.named_scope("propose"):
        adjustment = Adjustment.of(
            tokens, denoiser.mask_token_id, settings.ban_mask, settings.penalty_lambda
        )
        proposal = draw(
            denoiser.propose(params, hidden, adjustment),
            lambda: adjustment.apply(denoiser.logits(params, hidden)),
            jax.vmap(lambda key, at, n: jax.random.fold_in(jax.random.fold_in(key, at), n))(
                settings.key, state.position, state.step
            ),
            settings.temperature,
            settings.top_k,
            settings.top_p,
            settings.min_p,
        )
    with jax.named_scope("decide"):
        generated = positions >= state.prompt_length[:, None]
        masked = generated & (tokens == denoiser.mask_token_id)
        no_mask = ~masked.any(-1)
        minimum = jnp.where(
            settings.steps > 0,
            transfer_quota(state.step, jnp.maximum(settings.steps, 1), block_length),
            settings.num_to_transfer,
        )
        fill = mask_to_token(masked, proposal.confidence, settings.threshold, minimum)
        edit = token_to_token(
            generated & ~masked,
            tokens,
            proposal.tokens,
            proposal.confidence,
            settings.editing_threshold,
        )
        write = (fill | edit) & denoise[:, None]
        written = jnp.where(write, proposal.tokens, tokens)
        confidence = jnp.where(
            write,
            proposal.confidence,
            take_span(state.confidence, state.position, block_length),
        )
    entropy = (proposal.entropy * generated).sum(-1) / jnp.maximum(generated.sum(-1), 1)
    index = state.position // block_length
    entropy = jnp.where(denoise, entropy, take_span(state.block_entropy, index, 1)[:, 0])
    state = state.replace(
        tokens=put_span(state.tokens, written, state.position),
        confidence=put_span(state.confidence, confidence, state.position),
        cache=cache,
        step=state.step + denoise,
        post_step=state.post_step + (denoise & no_mask),
        stale=jnp.where(denoise, (written != tokens).any(-1), state.stale & ~commit),
        block_entropy=put_span(state.block_entropy, entropy[:, None], index),
        num_forwards=state.num_forwards + denoise,
        num_commit_forwards=state.num_commit_forwards + commit,
        num_edits=state.num_edits + (edit & denoise[:, None]).sum(-1),
    )
    wrote_stop = (write & is_stop_token(proposal.tokens, settings.stop_tokens)).any(-1)
    finished = denoise & _block_is_finished(
        state,
        block_length,
        masked_before=~no_mask,
        masked_now=(generated & (written == denoiser.mask_token_id)).any(-1),
        edited=edit.any(-1),
        wrote_stop=wrote_stop,
        mask_token_id=denoiser.mask_token_id,
    )
    state = advance(state, commit, block_length)
    return finish_block(state, finished, block_length, max_window), proposal


def _block_is_finished(
    state: DecodeState,
    block_length: int,
    *,
    masked_before: Array,
    masked_now: Array,
    edited: Array,
    wrote_stop: Array,
    mask_token_id: int,
) -> Bool[Array, " B"]:
    """Whether the released loop would leave the block after this forward (``step`` counts it).

    2.1: nothing was masked and nothing was edited, or the next mask-free forward would exceed
    ``max_post_steps`` (tested before that forward). 2.0 (``steps`` set, editing off): nothing is
    masked, the steps are used up, or the text up to a stop token just written is complete.
    """
    settings = state.settings
    stable = ~masked_before & ~edited
    out_of_budget = ~masked_now & (state.post_step >= settings.max_post_steps)
    v21 = stable | out_of_budget
    text_complete = _first(is_stop_token(state.tokens, settings.stop_tokens), state) < _first(
        state.tokens == mask_token_id, state
    )
    v20 = (
        ~masked_now
        | (state.step >= settings.steps)
        | (settings.eos_early_stop & wrote_stop & text_complete)
    )
    # Only a model that may predict the mask gets here without finishing first.
    capped = state.step >= 4 * block_length + settings.max_post_steps
    return jnp.where(uses_quota_rule(state), v20, v21) | capped


def _first(where: Bool[Array, "B S"], state: DecodeState) -> Int[Array, " B"]:
    """The first generated position where ``where`` holds; S if there is none."""
    positions = jnp.arange(where.shape[1])
    where = where & (positions >= state.prompt_length[:, None])
    return jnp.where(where, positions, where.shape[1]).min(-1)
