"""What the training objective does: one frozen dataclass, constant within a phase of training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from llada_jax.config import ConfigError, unknown_field_message

LOSS_WEIGHTS = ("mean", "inverse_t")
NOISE_LEVELS = ("block", "sequence")
LAYOUTS = ("split", "joint")


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """The mixture of mask-to-token (M2T) and token-to-token (T2T) training (2.1 report).

    Names that dFactory has are kept. Rates and probabilities are in ``[0, 1]``.

    Attributes:
      block_size: tokens a block, counted from the beginning of each document.
      mdlm: no clean copy, a document is one block (2.0's stable phase); ``block_size`` then only
        says over which stretches one t is drawn (``noise_level="block"``).
      noise_range_low, noise_range_high: the mask rate t is uniform in between.
      noise_level: one t a ``"block"`` or a ``"sequence"`` (document), stratified over the batch.
      loss_weight: masked tokens count 1 (``"mean"``) or 1/t (``"inverse_t"``: the sum is then an
        unbiased bound on the negative log-likelihood, a supervised token).
      mask_loss: weight of masked tokens (M2T).
      edit_loss: weight of visible tokens that are wrong (T2T).
      keep_loss: weight of visible tokens that are right. Without it a model never learns to leave
        a right token alone.
      random_edit_rate: share of the visible tokens that are replaced by random ones in round 0.
      complementary: a second copy masks what the first left visible (SFT in the 2.0 report).
      rounds: multi-turn forward: from round 1 on, the model's own predictions are written into the
        draft of the round before. Each round has a loss.
      draft_threshold_low, draft_threshold_high: a masked position is filled where the model's
        probability exceeds a threshold, drawn uniformly in between for each block.
      draft_edit_rate: share of the blocks in which visible tokens that the model would change are
        changed too, wherever its probability exceeds a threshold drawn from
        ``[0, draft_threshold_high]``.
      confidence_beta: weight of CAP's entropy term; 0 switches it off.
      confidence_temperature: temperature of the entropy's distribution (dParallel uses 0.5).
      cart_p: p of CART's geometric token weights; 0 switches them off.
      mask_noise_steps: for so many steps, noise as long as a token's embedding is added to the
        embedded masks, falling linearly to 0. For weights of an autoregressive model.
      z_loss: weight of the router's z-loss.
      layout: ``"split"``: the noisy copies read the clean copy's keys and values from a pass of its
        own; ``"joint"``: one pass over ``[x_t ; x_0]``. Equal results; ``"split"`` computes less,
        ``"joint"`` gathers sharded weights once.
      aligned: documents start at multiples of ``block_size`` in their rows. Attention then visits
        fewer tiles. A training run sets it, from ``data.block_length``.
      loss_chunk: tokens of a row whose scores are in memory at a time.

    Raises:
      ConfigError: on a value out of range.
    """

    block_size: int = 32
    mdlm: bool = False
    noise_range_low: float = 0.0
    noise_range_high: float = 1.0
    noise_level: str = "block"
    loss_weight: str = "mean"
    mask_loss: float = 1.0
    edit_loss: float = 1.0
    keep_loss: float = 0.3
    random_edit_rate: float = 0.1
    complementary: bool = False
    rounds: int = 1
    draft_threshold_low: float = 0.1
    draft_threshold_high: float = 0.9
    draft_edit_rate: float = 0.5
    confidence_beta: float = 0.0
    confidence_temperature: float = 1.0
    cart_p: float = 0.0
    mask_noise_steps: int = 0
    z_loss: float = 0.0
    layout: str = "split"
    aligned: bool = False
    loss_chunk: int = 128

    def __post_init__(self):
        def require(ok: bool, name: str, wanted: str):
            if not ok:
                raise ConfigError(f"diffusion.{name} = {getattr(self, name)!r} must be {wanted}")

        for name in ("block_size", "rounds", "loss_chunk"):
            require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("mask_loss", "edit_loss", "keep_loss", "confidence_beta", "z_loss"):
            require(getattr(self, name) >= 0, name, "at least 0")
        for name in ("random_edit_rate", "draft_edit_rate", "cart_p"):
            require(0 <= getattr(self, name) <= 1, name, "between 0 and 1")
        for name in ("noise_range", "draft_threshold"):
            low = getattr(self, f"{name}_low")
            require(0 <= low <= 1, f"{name}_low", "between 0 and 1")
            require(low <= getattr(self, f"{name}_high") <= 1, f"{name}_high", f"in [{low}, 1]")
        require(self.mask_noise_steps >= 0, "mask_noise_steps", "at least 0")
        require(self.confidence_temperature > 0, "confidence_temperature", "positive")
        require(self.loss_weight in LOSS_WEIGHTS, "loss_weight", f"one of {LOSS_WEIGHTS}")
        require(self.noise_level in NOISE_LEVELS, "noise_level", f"one of {NOISE_LEVELS}")
        require(self.layout in LAYOUTS, "layout", f"one of {LAYOUTS}")

    @property
    def copies(self) -> int:
        """Noisy copies that a round holds."""
        return 2 if self.complementary else 1

    @classmethod
    def from_mapping(cls, raw: Mapping[str, Any]) -> DiffusionConfig:
        """Reads YAML values.

        Raises:
          ConfigError: for an unknown field (the nearest known one is named), or a bad value.
        """
        return cls(**checked_fields(cls, raw, "diffusion"))


def checked_fields(cls: type, raw: Mapping[str, Any], section: str) -> dict[str, Any]:
    """Checks names and types of YAML values against a dataclass with plain fields.

    ``1e-5``, which YAML reads as a string, is a number here.

    Raises:
      ConfigError: for an unknown field, or a value of another type.
    """
    kinds = {"int": int, "float": (int, float), "bool": bool, "str": str}
    declared = {f.name: str(f.type) for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for name, value in raw.items():
        if name not in declared:
            raise ConfigError(unknown_field_message(name, list(declared), section))
        kind, *optional = declared[name].split(" | ")
        if value is None and "None" in optional:
            values[name] = None
            continue
        if kind not in kinds:
            values[name] = value
            continue
        if kind in ("int", "float") and isinstance(value, str):
            value = _number(value)
        if kind == "int" and isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, kinds[kind]) or isinstance(value, bool) != (kind == "bool"):
            raise ConfigError(f"{section}.{name} = {value!r} must be of type {kind}")
        values[name] = float(value) if isinstance(value, int) and kind == "float" else value
    return values


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text
