"""Finds a model folder's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llada_jax.text.byte import ByteTokenizer
from llada_jax.text.hf import HFTokenizer
from llada_jax.text.protocol import MASK_TOKEN, Tokenizer, TokenizerError
from llada_jax.text.special import (
    TOKENIZER_CONFIG,
    SpecialNames,
    agreed_eos_id,
    agreed_mask_id,
    read_json,
)
from llada_jax.text.spm import SentencePieceTokenizer


def load_tokenizer(
    folder: str | Path,
    *,
    mask_token_id: int | None = None,
    eos_token_ids: Sequence[int] = (),
) -> Tokenizer | None:
    """Loads the tokenizer of a model folder, by which file it holds.

    ``tokenizer.json`` comes first, then ``tokenizer.model`` (or the only ``*.model``), then
    ``{"tokenizer_class": "ByteTokenizer"}`` in ``tokenizer_config.json``.

    Args:
      folder: a model folder.
      mask_token_id, eos_token_ids: of the model's configuration; the tokenizer's must agree.

    Returns:
      The tokenizer, or ``None`` if there is none: such a model reads and writes token ids.

    Raises:
      TokenizerError: if a file is broken, or the ids disagree.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise TokenizerError(f"{folder} is not a folder; give the folder that holds config.json")
    names = SpecialNames.from_folder(folder)
    fast = folder / "tokenizer.json"
    if fast.is_file():
        return HFTokenizer(
            fast, names=names, mask_token_id=mask_token_id, eos_token_ids=eos_token_ids
        )
    pieces = _sentencepiece_file(folder)
    if pieces is not None:
        return SentencePieceTokenizer(
            pieces, names=names, mask_token_id=mask_token_id, eos_token_ids=eos_token_ids
        )
    config = folder / TOKENIZER_CONFIG
    if config.is_file() and read_json(config).get("tokenizer_class") == "ByteTokenizer":
        tokenizer = ByteTokenizer()
        own = {MASK_TOKEN: tokenizer.mask_token_id, "<|endoftext|>": tokenizer.eos_token_id}
        agreed_mask_id(MASK_TOKEN, mask_token_id, own.get, tokenizer.token_text, config)
        agreed_eos_id("<|endoftext|>", eos_token_ids, own.get, config)
        return tokenizer
    return None


def _sentencepiece_file(folder: Path) -> Path | None:
    usual = folder / "tokenizer.model"
    if usual.is_file():
        return usual
    found = sorted(folder.glob("*.model"))
    if len(found) > 1:
        raise TokenizerError(
            f"{folder} holds several sentencepiece models ({', '.join(f.name for f in found)}); "
            "call the right one tokenizer.model"
        )
    return found[0] if found else None
