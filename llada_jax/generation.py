"""What sampling returns."""

from __future__ import annotations

import dataclasses
from typing import Literal

from llada_jax.decoding import Trace, TraceStep


@dataclasses.dataclass(frozen=True)
class Generation:
    """The continuation of one prompt.

    Attributes:
      prompt_token_ids: the prompt as the model saw it.
      token_ids: generated tokens only, cut after the first stop token, which is included.
      text: their text without the stop token; cut before a stop string. Empty if the model came
        without a tokenizer.
      finish_reason: ``"stop"`` (a stop token or stop string) or ``"length"``.
      confidences: the probability of each token when it was last written.
      num_forwards: denoising and window-editing forwards of this row.
      num_commit_forwards: forwards that only stored keys and values; prefill is not counted.
      num_edits: tokens that were rewritten on the way, in all blocks.
      trace: every step, if ``return_trace`` was set.
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: Literal["stop", "length"]
    confidences: tuple[float, ...]
    num_forwards: int
    num_commit_forwards: int
    num_edits: int
    trace: Trace | None = None

    @property
    def num_tokens(self) -> int:
        """Generated tokens, a stop token included."""
        return len(self.token_ids)

    @property
    def tokens_per_forward(self) -> float:
        """TPF as the reports count it: generated tokens over denoising forwards."""
        return self.num_tokens / max(self.num_forwards, 1)


@dataclasses.dataclass(frozen=True)
class StreamEvent:
    """One thing that happened while a prompt is continued.

    Attributes:
      kind: ``"step"``: a forward pass was made (only with ``steps=True``); ``"block"``: more of
        the result became final; ``"end"``: the last event.
      token_ids: tokens that became final with this event.
      text: text that became final with it; the texts of all events joined are the generation's.
      step: the forward pass of a ``"step"``.
      generation: the whole result, at the ``"end"``.
    """

    kind: Literal["step", "block", "end"]
    token_ids: tuple[int, ...] = ()
    text: str = ""
    step: TraceStep | None = None
    generation: Generation | None = None
