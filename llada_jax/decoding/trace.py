"""What happened to one row, step by step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Int

from llada_jax.decoding.decoder import StepRecord
from llada_jax.decoding.state import Phase


@dataclasses.dataclass(frozen=True)
class TraceStep:
    """One forward pass over a span of W positions (a block, or an editing window of blocks).

    Attributes:
      phase: ``DENOISE``, ``COMMIT``, ``EDIT_WINDOW`` or ``REWRITE_WINDOW``; the second and the
        last change no token.
      start: absolute position of the span's first token.
      block_index: the active block, counted from position 0 of the prompt.
      before, after: the span's tokens on entry and on exit.
      unmasked: positions of the span that were filled.
      edited: positions whose token was replaced by another one.
      proposal: the model's token at every position, written or not.
      confidence: its probability.
    """

    phase: Phase
    start: int
    block_index: int
    before: Int[np.ndarray, " W"]
    after: Int[np.ndarray, " W"]
    unmasked: Bool[np.ndarray, " W"]
    edited: Bool[np.ndarray, " W"]
    proposal: Int[np.ndarray, " W"]
    confidence: Float[np.ndarray, " W"]


@dataclasses.dataclass(frozen=True)
class Trace:
    """All steps of one row.

    Attributes:
      prompt_token_ids: the prompt.
      block_length: C.
      mask_token_id: the id that stands for a position not yet filled.
      end: first position after the canvas.
      steps: the forwards, in order.
    """

    prompt_token_ids: tuple[int, ...]
    block_length: int
    mask_token_id: int
    end: int
    steps: tuple[TraceStep, ...]

    def canvases(self) -> Iterator[Int[np.ndarray, " L"]]:
        """The whole canvas before the first step, then after each step."""
        canvas = np.full(self.end, self.mask_token_id, np.int32)
        canvas[: len(self.prompt_token_ids)] = self.prompt_token_ids
        yield canvas.copy()
        for step in self.steps:
            canvas[step.start : step.start + len(step.after)] = step.after
            yield canvas.copy()


def steps_of_record(
    record: StepRecord, row: int, end: int, block_length: int, mask_token_id: int
) -> list[TraceStep]:
    """The forwards of one row in the record of one ``Decoder.run`` (arrays already on the host).

    Spans are cut to the active block, which a window's fixed width may exceed.
    """
    steps = []
    for i in range(int(record.count)):
        phase = Phase(int(record.phase[i, row]))
        if phase == Phase.DONE:
            continue
        start, block_start = int(record.start[i, row]), int(record.position[i, row])
        span = slice(0, min(block_start + block_length, end) - start)
        before, after = (np.asarray(a[i, row, span]) for a in (record.before, record.after))
        changed, masked = before != after, before == mask_token_id
        steps.append(
            TraceStep(
                phase=phase,
                start=start,
                block_index=block_start // block_length,
                before=before,
                after=after,
                unmasked=changed & masked,
                edited=changed & ~masked,
                proposal=np.asarray(record.proposal[i, row, span]),
                confidence=np.asarray(record.confidence[i, row, span]),
            )
        )
    return steps
