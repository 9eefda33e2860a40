"""Special tokens: their names in a folder, and whether the model's configuration means the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llada_jax.config import ConfigError, read_mapping
from llada_jax.text.protocol import MASK_TOKEN, TokenizerError

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"


@dataclasses.dataclass(frozen=True)
class SpecialNames:
    """What a folder calls its special tokens; ``None`` where it does not say.

    Attributes:
      mask, eos, pad: names with a meaning to the decoder.
      others: further names, of the beginning of a text, of roles and the like.
    """

    mask: str | None = None
    eos: str | None = None
    pad: str | None = None
    others: tuple[str, ...] = ()

    @classmethod
    def from_folder(cls, folder: Path) -> SpecialNames:
        """Reads ``tokenizer_config.json``, and ``special_tokens_map.json`` for what it lacks.

        Raises:
          TokenizerError: if one of the files is broken.
        """
        merged: dict[str, Any] = {}
        for file in (folder / TOKENIZER_CONFIG, folder / SPECIAL_TOKENS_MAP):
            if file.is_file():
                for key, value in read_json(file).items():
                    if value is not None:
                        merged.setdefault(key, value)
        named = {key: content(value) for key, value in merged.items() if key.endswith("_token")}
        found = {key: name for key, name in named.items() if name}
        roles = ("mask_token", "eos_token", "pad_token", "unk_token")
        others = [name for key, name in found.items() if key not in roles]
        for key in ("additional_special_tokens", "extra_special_tokens"):
            listed = merged.get(key)
            items = list(listed.values()) if isinstance(listed, Mapping) else listed
            if isinstance(items, list):
                others += [name for name in map(content, items) if name]
        return cls(
            mask=found.get("mask_token"),
            eos=found.get("eos_token"),
            pad=found.get("pad_token"),
            others=tuple(dict.fromkeys(others)),
        )

    def all(self) -> tuple[str, ...]:
        """Every name except the mask's."""
        return tuple(name for name in (self.eos, self.pad, *self.others) if name)


def content(entry: Any) -> str | None:
    """The text of a token entry: a string, or an object with ``content``."""
    if isinstance(entry, Mapping):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


def read_json(file: Path) -> dict[str, Any]:
    """Reads a tokenizer's JSON object.

    Raises:
      TokenizerError: naming the file, if it is broken.
    """
    try:
        return read_mapping(file)
    except ConfigError as error:
        raise TokenizerError(str(error)) from error


def agreed_mask_id(
    name: str | None,
    configured: int | None,
    id_of: Callable[[str], int | None],
    text_of: Callable[[int], str | None],
    file: str | Path,
) -> int | None:
    """The mask's id, on which the tokenizer and the model's configuration must agree.

    Args:
      name: what the tokenizer calls its mask, ``None`` if it does not say.
      configured: ``mask_token_id`` of the model, ``None`` if there is no model.
      id_of, text_of: look a token up; ``None`` where the vocabulary lacks it.
      file: the tokenizer's file, for messages.

    Raises:
      TokenizerError: if they disagree. The tokenizers of related models (Ling, Ring) have the
        released mask's id 156895 too, but as ``<|role_end|>``.
    """
    own = id_of(name if name is not None else MASK_TOKEN)
    if configured is None or own == configured:
        return own
    text = text_of(configured)
    if own is not None:
        raise TokenizerError(
            f"{file}: the mask token {name or MASK_TOKEN!r} has id {own}, but the model's "
            f"mask_token_id = {configured} (here {text!r}); use the tokenizer that belongs to the "
            "model, or correct mask_token_id in config.json"
        )
    if text is not None and "mask" not in text.lower():
        raise TokenizerError(
            f"{file}: the model's mask_token_id = {configured} is {text!r} in this tokenizer, "
            "which does not look like a mask; use the tokenizer that belongs to the model, or, if "
            f"this is meant, name it as mask_token in {TOKENIZER_CONFIG}"
        )
    return configured


def agreed_eos_id(
    name: str | None,
    configured: Sequence[int],
    id_of: Callable[[str], int | None],
    file: str | Path,
) -> int | None:
    """The end token's id, which must be one of the model's.

    Args:
      name: what the tokenizer calls it, ``None`` if it does not say.
      configured: the model's end tokens, empty if there is no model.
      id_of: looks a token up.
      file: the tokenizer's file, for messages.

    Raises:
      TokenizerError: if the model would not stop at the tokenizer's end token.
    """
    own = id_of(name) if name is not None else None
    if own is None:
        return configured[0] if configured else None
    if configured and own not in configured:
        raise TokenizerError(
            f"{file}: the end token {name!r} has id {own}, but the model's eos_token_id is "
            f"{', '.join(map(str, configured))}; use the tokenizer that belongs to the model, or "
            "correct eos_token_id in config.json"
        )
    return own
