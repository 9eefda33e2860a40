"""What a user can set for one request."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from typing import Any, no_type_check

from llada_jax.config import unknown_field_message

# Other libraries' spellings of our fields.
ALIASES = {
    "gen_length": "max_tokens",
    "max_new_tokens": "max_tokens",
    "edit_threshold": "editing_threshold",
    "max_post_edit_steps": "max_post_steps",
    "num_inference_steps": "steps",
    "denoising_steps": "steps",
}


class SamplingError(ValueError):
    """A request that cannot be honoured; the message names the field, its value and the way out."""


@no_type_check  # checks its fields itself, with better messages
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one prompt is continued. Defaults are LLaDA2.1's quality mode.

    Attributes:
      max_tokens: generated tokens at most (``gen_length``, ``max_new_tokens``).
      block_length: tokens denoised together, a power of two; the released models use 32.
      threshold: τ_mask. A masked position is filled when its probability is above it. With 1.0
        nothing is above, so the best ``num_to_transfer`` are filled in each step.
      editing_threshold: τ_edit. A generated token is replaced when another one has a probability
        above it; 0.0 replaces on every differing argmax, ``None`` switches editing off.
      max_post_steps: forwards a block may spend on editing once nothing is masked.
      num_to_transfer: masked positions filled in a step even if none is above ``threshold``.
      steps: ``None`` for 2.1's loop. A number selects 2.0's quota rule: position counts of the
        block divided over that many steps, in place of ``num_to_transfer``; with editing off the
        block ends with its last mask.
      temperature: 0 is greedy; above, tokens are drawn, and confidence is the probability under
        the filtered, scaled distribution.
      top_k, top_p, min_p: filters of that distribution, in this order; ``None``/0 is off.
      seed: of the draws; ``None`` takes a fresh one for each request.
      stop: strings that end the text; it is cut before the first of them.
      stop_token_ids: token ids that end the text besides the model's own.
      ignore_eos: the model's end-of-text tokens do not end the text.
      eos_early_stop: stop after the block that holds a stop token, instead of filling
        ``max_tokens`` and cutting.
      penalty_lambda: subtracted from the logit of the token that stands one position before
        (against stuttering); 0 is off.
      ban_mask: never predict the mask token. The released code may predict it, and can then loop
        for ever; with ``False`` a block ends after ``4 * block_length + max_post_steps`` forwards.
      multi_block_window: K. After each block, the last K blocks are reopened for editing.
      multi_block_steps: editing passes over that window at most.
      multi_block_entropy_quantile: reopen only earlier blocks whose mean entropy is at or above
        this quantile of the row's blocks so far (0.75: the most surprising quarter).
      return_trace: record every step.

    Raises:
      SamplingError: on an unknown field or a value outside its range.
    """

    max_tokens: int = 512
    block_length: int = 32
    threshold: float = 0.7
    editing_threshold: float | None = 0.5
    max_post_steps: int = 16
    num_to_transfer: int = 1
    steps: int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | tuple[str, ...] | list[str] = ()
    stop_token_ids: tuple[int, ...] | list[int] = ()
    ignore_eos: bool = False
    eos_early_stop: bool = True
    penalty_lambda: float = 0.0
    ban_mask: bool = True
    multi_block_window: int = 1
    multi_block_steps: int = 5
    multi_block_entropy_quantile: float | None = None
    return_trace: bool = False

    def __post_init__(self):
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        tokens: Any = self.stop_token_ids
        tokens = (tokens,) if isinstance(tokens, int) else tuple(tokens or ())
        object.__setattr__(self, "stop_token_ids", tokens)
        for name, (low, high) in _INTEGERS.items():
            self._check_number(name, low, high, integer=True)
        for name, (low, high) in _REALS.items():
            self._check_number(name, low, high, integer=False)
        for name in ("ignore_eos", "eos_early_stop", "ban_mask", "return_trace"):
            if not isinstance(getattr(self, name), bool):
                raise SamplingError(f"{name} = {getattr(self, name)!r} must be True or False")
        if self.block_length & (self.block_length - 1):
            below = 1 << (self.block_length.bit_length() - 1)
            raise SamplingError(
                f"block_length = {self.block_length} is not supported; it must be a power of two: "
                f"use {below} or {2 * below} (the released models use 32)"
            )
        if self.multi_block_window > 1 and self.editing_threshold is None:
            raise SamplingError(
                f"multi_block_window = {self.multi_block_window} edits earlier blocks, but "
                "editing_threshold is None (off); set an editing_threshold"
            )
        if not all(isinstance(s, str) and s for s in stop):
            raise SamplingError(f"stop = {self.stop!r} must hold non-empty strings")
        for token in self.stop_token_ids:
            if not _is_number_in(token, 0, math.inf, integer=True):
                raise SamplingError(f"stop_token_ids holds {token!r}; token ids are integers >= 0")

    def _check_number(self, name: str, low: int, high: float | int, *, integer: bool):
        value: Any = getattr(self, name)
        if value is None and name in _OPTIONAL:
            return
        if not _is_number_in(value, low, high, integer):
            number = "an integer" if integer else "a number"
            span = f"from {low} to {high}" if high < math.inf else f"of at least {low}"
            hint = "; None switches it off" if name in _OPTIONAL else ""
            raise SamplingError(f"{name} = {value!r} must be {number} {span}{hint}")

    @classmethod
    def quality(cls, **fields: Any) -> SamplingParams:
        """2.1's quality mode (Q): τ_mask 0.7, τ_edit 0.5."""
        return cls._preset(fields, threshold=0.7, editing_threshold=0.5)

    @classmethod
    def speed(cls, **fields: Any) -> SamplingParams:
        """2.1's speed mode (S): τ_mask 0.5, τ_edit 0.0; draft early, fix by editing."""
        return cls._preset(fields, threshold=0.5, editing_threshold=0.0)

    @classmethod
    def v20(cls, **fields: Any) -> SamplingParams:
        """2.0's decoding: τ_mask 0.95, no editing, quota of one token a step for blocks of 32."""
        return cls._preset(fields, threshold=0.95, editing_threshold=None, steps=32)

    @classmethod
    def _preset(cls, changes: dict[str, Any], **preset: Any) -> SamplingParams:
        return cls(**preset | resolve_aliases(changes))

    @classmethod
    def from_mode(cls, mode: str, **fields: Any) -> SamplingParams:
        """The preset named ``"quality"``, ``"speed"`` or ``"v20"``, with changes."""
        presets = {"quality": cls.quality, "speed": cls.speed, "v20": cls.v20}
        if mode not in presets:
            raise SamplingError(f"mode = {mode!r} is not known; use {', '.join(presets)}")
        return presets[mode](**fields)


def _is_number_in(value: Any, low: int, high: float | int, integer: bool) -> bool:
    """Whether a value is a number (not a boolean, not NaN) of the range."""
    kind: Any = numbers.Integral if integer else numbers.Real  # numpy's numbers are among them
    is_number = isinstance(value, kind) and not isinstance(value, bool)
    return is_number and low <= float(value) <= high


_OPTIONAL = (
    "editing_threshold",
    "steps",
    "top_k",
    "top_p",
    "min_p",
    "seed",
    "multi_block_entropy_quantile",
)
_INTEGERS = {
    "max_tokens": (1, math.inf),
    "block_length": (1, 512),
    "max_post_steps": (0, 10_000),
    "num_to_transfer": (1, 512),
    "steps": (1, 10_000),
    "top_k": (0, math.inf),
    "seed": (0, 2**32 - 1),
    "multi_block_window": (1, 16),
    "multi_block_steps": (1, 1000),
}
_REALS = {
    "threshold": (0, 1),
    "editing_threshold": (0, 1),
    "temperature": (0, 1e6),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "penalty_lambda": (0, 1e6),
    "multi_block_entropy_quantile": (0, 1),
}
FIELD_NAMES = tuple(field.name for field in dataclasses.fields(SamplingParams))


def resolve_aliases(fields: dict[str, Any]) -> dict[str, Any]:
    """Renames other libraries' spellings; raises ``SamplingError`` for names nobody uses."""
    resolved: dict[str, Any] = {}
    for name, value in fields.items():
        field = ALIASES.get(name, name)
        if field not in FIELD_NAMES:
            raise SamplingError(
                unknown_field_message(name, (*FIELD_NAMES, *ALIASES), "SamplingParams")
            )
        if field in resolved:
            raise SamplingError(f"{field} is given twice (once as {name!r})")
        resolved[field] = value
    return resolved


_generated_init = SamplingParams.__init__


@functools.wraps(_generated_init)
def _init_with_aliases(self: SamplingParams, **fields: Any):
    _generated_init(self, **resolve_aliases(fields))


SamplingParams.__init__ = _init_with_aliases  # type: ignore[method-assign]
