"""Multi-block editing: after a block, the last K blocks are reopened and edited together.

The 2.1 report says no more than that earlier blocks are revised in the light of later ones; there
is no public implementation. Ours: up to N passes in which the window attends fully to itself (with
block-causal attention the earlier blocks could not see the later one, and nothing would change),
tokens replaced by the T2T rule, prompt positions excepted; then keys and values of the window are
recomputed block-causally from its first changed block on, so that the cache is again what an
uncached run would compute.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from llada_jax.decoding.denoiser import Denoiser
from llada_jax.decoding.rules import token_to_token
from llada_jax.decoding.sampling import Adjustment, Proposal
from llada_jax.decoding.state import DecodeState, Phase, put_span, take_span
from llada_jax.decoding.transitions import advance, settle
from llada_jax.model import write_cache
from pallas_kernels import WindowMask


def window_start(state: DecodeState, block_length: int) -> Array:
    """First position of each row's window: K blocks back, but not before the generated text."""
    first_block = state.prompt_length // block_length * block_length
    back = (state.settings.window - 1) * block_length
    return jnp.maximum(first_block, state.position - back)


def window_step(
    denoiser: Denoiser, params: Any, state: DecodeState, block_length: int, max_window: int
) -> tuple[DecodeState, Proposal]:
    """Runs rows in EDIT_WINDOW and REWRITE_WINDOW one forward further; the others stay.

    The proposal is greedy at every temperature, and never the mask.
    """
    editing, rewriting = state.phase == Phase.EDIT_WINDOW, state.phase == Phase.REWRITE_WINDOW
    width = max_window * block_length
    start = window_start(state, block_length)
    tokens = take_span(state.tokens, start, width)  # [B, W]
    positions = start[:, None] + jnp.arange(width)
    inside = positions < state.position[:, None] + block_length
    mask = WindowMask(state.position + block_length - start, ~editing, block_length)
    with jax.named_scope("window_forward"):
        active = editing | rewriting
        live = inside & active[:, None]
        prefix = jnp.where(active, start, 0)
        hidden, fresh = denoiser.forward(params, tokens, positions, mask, state.cache, prefix, live)
    changed = positions >= state.changed_from[:, None]
    cache = write_cache(state.cache, fresh, start, inside & changed & rewriting[:, None])
    with jax.named_scope("window_decide"):
        batch = len(tokens)
        adjustment = Adjustment.of(
            tokens, denoiser.mask_token_id, jnp.ones(batch, bool), jnp.zeros(batch)
        )
        proposal = denoiser.propose(params, hidden, adjustment)
        editable = inside & (positions >= state.prompt_length[:, None])
        editable &= tokens != denoiser.mask_token_id
        editable &= _surprising(state, positions // block_length, block_length)
        edit = editing[:, None] & token_to_token(
            editable,
            tokens,
            proposal.tokens,
            proposal.confidence,
            state.settings.editing_threshold,
        )
        written = jnp.where(edit, proposal.tokens, tokens)
        confidence = jnp.where(edit, proposal.confidence, take_span(state.confidence, start, width))
    first_edit = jnp.where(edit, positions, state.tokens.shape[1]).min(-1)
    state = state.replace(
        tokens=put_span(state.tokens, written, start),
        confidence=put_span(state.confidence, confidence, start),
        cache=cache,
        window_step=state.window_step + editing,
        changed_from=jnp.minimum(state.changed_from, first_edit // block_length * block_length),
        num_forwards=state.num_forwards + editing,
        num_commit_forwards=state.num_commit_forwards + rewriting,
        num_edits=state.num_edits + edit.sum(-1),
    )
    state = advance(state, rewriting, block_length)
    out_of_budget = state.window_step >= state.settings.window_steps
    return settle(state, editing & (~edit.any(-1) | out_of_budget), block_length), proposal


def _surprising(state: DecodeState, block: Array, block_length: int) -> Bool[Array, "B W"]:
    """Blocks that the entropy filter leaves open: the active one, and surprising earlier ones."""
    entropy = state.block_entropy
    index = jnp.arange(entropy.shape[1])
    first = state.prompt_length[:, None] // block_length
    active = state.position[:, None] // block_length
    history = jnp.where((index >= first) & (index < active), entropy, jnp.nan)
    quantile = state.settings.entropy_quantile
    watermark = jax.vmap(jnp.nanquantile)(history, jnp.clip(quantile, 0, 1))
    entropy_there = jnp.take_along_axis(entropy, jnp.minimum(block, entropy.shape[1] - 1), axis=1)
    open_ = (block == active) | (entropy_there >= watermark[:, None])
    return open_ | (quantile < 0)[:, None]
