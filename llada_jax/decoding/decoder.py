"""The decoder: one compiled program from prompts to finished canvases.

``Decoder.decode`` is that program. The same pieces also come apart, for streaming and for a
scheduler: ``start`` prefills a batch, ``run`` goes on for as many forwards as asked, ``insert``
puts a new request into the place of a finished row. All of them compile once a shape.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llada_jax.decoding.block_step import block_step
from llada_jax.decoding.denoiser import Denoiser
from llada_jax.decoding.multi_block import window_start, window_step
from llada_jax.decoding.sampling import Proposal
from llada_jax.decoding.state import DecodeState, Phase, RowSettings, take_span
from llada_jax.model import write_cache
from pallas_kernels import WindowMask


@no_type_check  # a pytree also holds tracers, shapes, shardings
class DecodeResult(flax.struct.PyTreeNode):
    """Finished canvases and what they took.

    Attributes:
      tokens: prompt, generated tokens, and possibly masks in blocks that were never reached.
      confidence: probability of each token when it was last written.
      num_forwards: denoising and window-editing forwards of each row.
      num_commit_forwards: forwards that only stored keys and values (prefill not counted).
      num_edits: tokens that were rewritten.
    """

    tokens: Int[Array, "B S"]
    confidence: Float[Array, "B S"]
    num_forwards: Int[Array, " B"]
    num_commit_forwards: Int[Array, " B"]
    num_edits: Int[Array, " B"]


@no_type_check  # a pytree also holds tracers, shapes, shardings
class StepRecord(flax.struct.PyTreeNode):
    """The forwards of one ``run``, in order; ``count`` of the R slots are used.

    ``phase``, ``start`` (first position of the span of W tokens) and ``position`` (of the active
    block) are those on entry; ``proposal`` and ``confidence`` are the model's, written or not. A
    row that was DONE, or waited for others' windows, has phase DONE.
    """

    count: Int[Array, ""]
    phase: Int[Array, "R B"]
    start: Int[Array, "R B"]
    position: Int[Array, "R B"]
    before: Int[Array, "R B W"]
    after: Int[Array, "R B W"]
    proposal: Int[Array, "R B W"]
    confidence: Float[Array, "R B W"]


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A static description of the decoding program; hashable, so ``jit`` keys on it.

    Attributes:
      denoiser: the model.
      block_length: C, tokens denoised together.
      max_window: the largest multi-block window of any row; 1 compiles no window forward.
      prefill_chunk: prompt tokens a prefill forward reads, a multiple of C. A canvas longer than
        this must be a multiple of it.
      record_steps: R, forwards that one ``run`` records; 0 records none and is faster. A
        recording ``run`` stops after R forwards.
    """

    denoiser: Denoiser
    block_length: int = 32
    max_window: int = 1
    prefill_chunk: int = 256
    record_steps: int = 0

    def __post_init__(self):
        if self.prefill_chunk % self.block_length:
            raise ValueError(
                f"prefill_chunk = {self.prefill_chunk} must be a multiple of block_length = "
                f"{self.block_length}"
            )

    def canvas_length(self, tokens: int) -> int:
        """The shortest valid canvas for ``tokens`` prompt and generated tokens."""
        blocks = -(-tokens // self.block_length) + self.max_window - 1
        length = blocks * self.block_length
        chunk = self.prefill_chunk
        return length if length <= chunk else -(-length // chunk) * chunk

    @functools.partial(jax.jit, static_argnums=0)
    def decode(
        self,
        params: Any,
        tokens: Int[Array, "B S"],
        prompt_length: Int[Array, " B"],
        end: Int[Array, " B"],
        settings: RowSettings,
    ) -> DecodeResult:
        """Prefills the prompts and decodes until every row is done, without a host round trip.

        Args:
          params: the denoiser's weights.
          tokens: prompts, each followed by mask tokens; S as ``canvas_length`` gives.
          prompt_length: prompt tokens of each row.
          end: where each row's canvas ends: ``prompt_length`` plus the tokens wanted, rounded up
            to whole blocks. 0 marks a row that only fills the batch.
          settings: sampling parameters, one a row.
        """
        state = self._start(params, tokens, prompt_length, end, settings)
        state = jax.lax.while_loop(
            lambda s: ~s.done.all(), lambda s: self._step(params, s)[0], state
        )
        return result_of(state)

    @functools.partial(jax.jit, static_argnums=0)
    def start(
        self,
        params: Any,
        tokens: Int[Array, "B S"],
        prompt_length: Int[Array, " B"],
        end: Int[Array, " B"],
        settings: RowSettings,
    ) -> DecodeState:
        """Prefills a batch (arguments as ``decode``); nothing is decoded yet."""
        return self._start(params, tokens, prompt_length, end, settings)

    @functools.partial(jax.jit, static_argnums=0, donate_argnames="state")
    def run(
        self,
        params: Any,
        state: DecodeState,
        max_forwards: Int[Array, ""] | int = 2**30,
        until_commit: Bool[Array, ""] | bool = False,
    ) -> tuple[DecodeState, StepRecord | None]:
        """Runs until all rows are done, ``max_forwards`` were made, or a record is full.

        Args:
          params: the denoiser's weights.
          state: given up to the call (its memory is reused).
          max_forwards: forwards of the batch at most.
          until_commit: also stop as soon as any row finishes a block.

        Returns:
          The state, and a record of the forwards if ``record_steps`` is positive.
        """
        entry = state.position, state.done
        record = self._empty_record(state) if self.record_steps else None

        def goes_on(carry):
            state, forwards, _ = carry
            moved = ((state.position != entry[0]) | (state.done != entry[1])).any()
            limit = jnp.asarray(max_forwards)
            if self.record_steps:
                limit = jnp.minimum(limit, self.record_steps)
            return ~state.done.all() & (forwards < limit) & ~(jnp.asarray(until_commit) & moved)

        def body(carry):
            before, forwards, record = carry
            after, proposal = self._step(params, before)
            if record is not None:
                record = self._recorded(record, forwards, before, after, proposal)
            return after, forwards + 1, record

        state, _, record = jax.lax.while_loop(goes_on, body, (state, jnp.int32(0), record))
        return state, record

    @functools.partial(jax.jit, static_argnums=0, donate_argnames="state")
    def insert(
        self,
        params: Any,
        state: DecodeState,
        row: Int[Array, ""] | int,
        tokens: Int[Array, " S"],
        prompt_length: Int[Array, ""] | int,
        end: Int[Array, ""] | int,
        settings: RowSettings,
    ) -> DecodeState:
        """Prefills one request and puts it into place ``row``, whatever that held.

        Args:
          params: the denoiser's weights.
          state: given up to the call; its other rows are untouched.
          row: the place.
          tokens, prompt_length, end: as in ``decode``, for one row.
          settings: of one row (``B = 1``).

        Raises:
          ValueError: if the request has more stop tokens than the batch has slots.
        """
        slots, wanted = state.settings.stop_tokens.shape[1], settings.stop_tokens.shape[1]
        if wanted > slots:
            raise ValueError(
                f"the request needs {wanted} stop-token slots, but the batch was started with "
                f"{slots}; start it with RowSettings.from_params(..., stop_slots={wanted})"
            )
        padding = ((0, 0), (0, slots - wanted))
        settings = settings.replace(
            stop_tokens=jnp.pad(settings.stop_tokens, padding, constant_values=-1)
        )
        one = self._start(
            params,
            tokens[None],
            jnp.asarray(prompt_length)[None],
            jnp.asarray(end)[None],
            settings,
        )
        cache = jax.tree.map(
            lambda all_, new: jax.lax.dynamic_update_index_in_dim(all_, new[:, 0], row, 1),
            state.cache,
            one.cache,
        )
        rest = jax.tree.map(
            lambda all_, new: all_.at[row].set(new[0]),
            state.replace(cache=None),
            one.replace(cache=None),
        )
        return rest.replace(cache=cache)

    @functools.partial(jax.jit, static_argnums=0, donate_argnames="state")
    def halt(self, state: DecodeState, rows: Bool[Array, " B"]) -> DecodeState:
        """Marks ``rows`` as done, for example because a stop string appeared in their text."""
        return state.replace(phase=jnp.where(rows, Phase.DONE, state.phase))

    def _start(self, params, tokens, prompt_length, end, settings) -> DecodeState:
        batch, length = tokens.shape
        chunk = min(self.prefill_chunk, length)
        if length % chunk or length % self.block_length:
            raise ValueError(
                f"a canvas of {length} tokens is not a whole number of prefill chunks of {chunk} "
                f"and blocks of {self.block_length}; use canvas_length()"
            )
        prefill_length = prompt_length // self.block_length * self.block_length
        span = jnp.arange(chunk)
        mask = WindowMask(causal=jnp.ones(batch, bool), block_length=self.block_length)

        def prefill(i, cache):
            start = jnp.full(batch, i * chunk)
            positions = start[:, None] + span
            live = positions < prefill_length[:, None]
            chunk_tokens = take_span(tokens, start, chunk)
            with jax.named_scope("prefill"):
                _, fresh = self.denoiser.forward(
                    params, chunk_tokens, positions, mask, cache, start, live
                )
            return write_cache(cache, fresh, start, live)

        cache = jax.lax.fori_loop(
            0,
            (prefill_length.max() + chunk - 1) // chunk,
            prefill,
            self.denoiser.init_cache(batch, length),
        )
        zeros = jnp.zeros(batch, jnp.int32)
        is_prompt = jnp.arange(length) < prompt_length[:, None]
        return DecodeState(
            tokens=tokens.astype(jnp.int32),
            confidence=is_prompt.astype(jnp.float32),
            prompt_length=prompt_length.astype(jnp.int32),
            end=end.astype(jnp.int32),
            position=prefill_length.astype(jnp.int32),
            phase=jnp.where(prefill_length < end, Phase.DENOISE, Phase.DONE).astype(jnp.int32),
            step=zeros,
            post_step=zeros,
            stale=zeros.astype(bool),
            window_step=zeros,
            changed_from=jnp.full(batch, length, jnp.int32),
            block_entropy=jnp.zeros((batch, length // self.block_length)),
            num_forwards=zeros,
            num_commit_forwards=zeros,
            num_edits=zeros,
            settings=settings,
            cache=cache,
        )

    def _step(self, params, state: DecodeState) -> tuple[DecodeState, Proposal]:
        arguments = (self.denoiser, params, state, self.block_length, self.max_window)
        if self.max_window == 1:
            return block_step(*arguments)

        def over_block(_):
            after, proposal = block_step(*arguments)
            beyond = (self.max_window - 1) * self.block_length
            return after, jax.tree.map(lambda a: jnp.pad(a, ((0, 0), (0, beyond))), proposal)

        return jax.lax.cond(
            (state.phase >= Phase.EDIT_WINDOW).any(),
            lambda _: window_step(*arguments),
            over_block,
            None,
        )

    def _empty_record(self, state: DecodeState) -> StepRecord:
        steps, batch = self.record_steps, len(state.tokens)
        width = self.max_window * self.block_length
        spans = jnp.zeros((steps, batch, width), jnp.int32)
        rows = jnp.zeros((steps, batch), jnp.int32)
        return StepRecord(
            jnp.int32(0), rows, rows, rows, spans, spans, spans, spans.astype(jnp.float32)
        )

    def _recorded(
        self, record: StepRecord, slot, before: DecodeState, after: DecodeState, proposal: Proposal
    ) -> StepRecord:
        width = self.max_window * self.block_length
        windowed = before.phase >= Phase.EDIT_WINDOW
        waits = windowed.any() & ~windowed
        start = jnp.where(windowed, window_start(before, self.block_length), before.position)
        return StepRecord(
            count=slot + 1,
            phase=record.phase.at[slot].set(jnp.where(waits, Phase.DONE, before.phase)),
            start=record.start.at[slot].set(start),
            position=record.position.at[slot].set(before.position),
            before=record.before.at[slot].set(take_span(before.tokens, start, width)),
            after=record.after.at[slot].set(take_span(after.tokens, start, width)),
            proposal=record.proposal.at[slot].set(proposal.tokens),
            confidence=record.confidence.at[slot].set(proposal.confidence),
        )


def result_of(state: DecodeState) -> DecodeResult:
    """What a state says about its rows, without the cache."""
    return DecodeResult(
        state.tokens,
        state.confidence,
        state.num_forwards,
        state.num_commit_forwards,
        state.num_edits,
    )
