"""What a row does next: the phases of a block's life.

DENOISE ──finished──► window open? ──yes──► EDIT_WINDOW ──no edit, or budget──┐
   ▲                      │ no                                                ▼
   │                      └───────────────────────────────────────────────► settle
   │                                                                          │
   ├──── advance ◄── REWRITE_WINDOW ◄── a window changed ────────────────────┤
   ├──── advance ◄── COMMIT ◄── cache predates the last change ──────────────┤
   ├──── advance ◄── nothing to store ────────────────────────────────────────┤
  DONE ◄── last block, or a stop token ───────────────────────────────────────┘
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from llada_jax.decoding.state import DecodeState, Phase


def finish_block(
    state: DecodeState, rows: Bool[Array, " B"], block_length: int, max_window: int
) -> DecodeState:
    """The active block of ``rows`` needs no more denoising."""
    if max_window == 1:
        return settle(state, rows, block_length)
    first_block = state.prompt_length // block_length * block_length
    opens = rows & (state.settings.window > 1) & (state.position > first_block)
    state = state.replace(
        phase=jnp.where(opens, Phase.EDIT_WINDOW, state.phase),
        window_step=jnp.where(opens, 0, state.window_step),
    )
    return settle(state, rows & ~opens, block_length)


def settle(state: DecodeState, rows: Bool[Array, " B"], block_length: int) -> DecodeState:
    """The tokens of ``rows`` up to the end of the active block are final for now."""
    block_end = state.position + block_length
    done = rows & ((block_end >= state.end) | _has_stopped(state, block_end))
    onward = rows & ~done
    rewrite = onward & (state.changed_from < state.tokens.shape[1])
    commit = onward & ~rewrite & state.stale
    phase = jnp.where(done, Phase.DONE, state.phase)
    phase = jnp.where(rewrite, Phase.REWRITE_WINDOW, phase)
    phase = jnp.where(commit, Phase.COMMIT, phase)
    return advance(state.replace(phase=phase), onward & ~rewrite & ~commit, block_length)


def advance(state: DecodeState, rows: Bool[Array, " B"], block_length: int) -> DecodeState:
    """``rows`` move to their next block; their cache is complete up to it."""
    length = state.tokens.shape[1]
    return state.replace(
        position=jnp.where(rows, state.position + block_length, state.position),
        phase=jnp.where(rows, Phase.DENOISE, state.phase),
        step=jnp.where(rows, 0, state.step),
        post_step=jnp.where(rows, 0, state.post_step),
        stale=state.stale & ~rows,
        changed_from=jnp.where(rows, length, state.changed_from),
    )


def _has_stopped(state: DecodeState, block_end: Array) -> Bool[Array, " B"]:
    """Whether the generated text, never the prompt, holds a stop token; 2.0 always stops then."""
    found = is_stop_token(state.tokens, state.settings.stop_tokens)
    stops = (found & _generated(state, block_end)).any(-1)
    return stops & (state.settings.eos_early_stop | uses_quota_rule(state))


def uses_quota_rule(state: DecodeState) -> Bool[Array, " B"]:
    """Rows decoded as by 2.0's loop: a schedule of steps, no editing."""
    return (state.settings.steps > 0) & jnp.isinf(state.settings.editing_threshold)


def is_stop_token(tokens: Int[Array, "B T"], stop_tokens: Int[Array, "B n"]) -> Bool[Array, "B T"]:
    """Which of ``tokens`` are among their row's ``stop_tokens`` (padded with -1)."""
    return (tokens[:, :, None] == stop_tokens[:, None, :]).any(-1)


def _generated(state: DecodeState, block_end: Array) -> Bool[Array, "B S"]:
    positions = jnp.arange(state.tokens.shape[1])
    return (positions >= state.prompt_length[:, None]) & (positions < block_end[:, None])
