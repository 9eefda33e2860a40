"""Tokenizers in Hugging Face's ``tokenizer.json``, the format of the released models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from llada_jax.text.mask_literal import MaskLiteral
from llada_jax.text.protocol import (
    MASK_TOKEN,
    REPLACEMENT,
    TokenizerError,
    byte_text,
    unknown_text,
    well_formed,
)
from llada_jax.text.special import SpecialNames, agreed_eos_id, agreed_mask_id

_WORD_START = "▁"  # how sentencepiece vocabularies write a space


def _byte_alphabet() -> dict[str, int]:
    """The letters in which byte-level vocabularies write bytes.

    A printable Latin-1 character writes its own byte; the others take letters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in printable}
    hidden = (byte for byte in range(256) if byte not in set(printable))
    return letters | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


_BYTE_OF_LETTER = _byte_alphabet()
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class HFTokenizer:
    """A ``tokenizer.json`` read by the ``tokenizers`` package.

    Args:
      file: the ``tokenizer.json``.
      names: special tokens by name, from the files next to it.
      mask_token_id, eos_token_ids: what the model's configuration says. A mask id beyond the
        vocabulary is accepted; such a token decodes to nothing.

    Raises:
      TokenizerError: if the file is broken, or disagrees with the model's configuration.
    """

    def __init__(
        self,
        file: str | Path,
        *,
        names: SpecialNames | None = None,
        mask_token_id: int | None = None,
        eos_token_ids: Sequence[int] = (),
    ):
        names = names or SpecialNames()
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises nothing narrower
            raise TokenizerError(f"{file} cannot be read as a tokenizer.json: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        # A name that is only a vocabulary entry so far would otherwise be split like other text.
        added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        known = [n for n in names.all() if tokenizer.token_to_id(n) is not None]
        tokenizer.add_special_tokens([name for name in known if name not in added])

        id_of, text_of = tokenizer.token_to_id, tokenizer.id_to_token
        mask = agreed_mask_id(names.mask, mask_token_id, id_of, self._text_or_none, file)
        self.mask_token_id: int | None = mask
        self.eos_token_id: int | None = agreed_eos_id(names.eos, eos_token_ids, id_of, file)
        pad = id_of(names.pad) if names.pad is not None else None
        self.pad_token_id: int | None = pad if pad is not None else self.eos_token_id
        ids = tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size: int = 1 + max(ids, default=-1)
        special = {i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
        named = (*map(id_of, known), mask, self.eos_token_id)
        special |= {token for token in named if token is not None}
        self.special_token_ids: frozenset[int] = frozenset(special)

        self._mask_name = MASK_TOKEN if mask is None else text_of(mask) or MASK_TOKEN
        self._mask_literal = MaskLiteral.of(mask, self._mask_name, self._encode)
        decoder = tokenizer.decoder
        self._byte_level = decoder is not None and decoder.decode(["Ġ"]) == " "
        self._byte_fallback = decoder is not None and decoder.decode(["<0x41>"]) == "A"

    def encode(self, text: str) -> list[int]:
        """See ``Tokenizer.encode``."""
        return self._mask_literal.spell_out(self._encode(well_formed(text)))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """See ``Tokenizer.decode``."""
        kept = [
            token
            for token in token_ids
            if 0 <= token < self.vocab_size
            and not (skip_special_tokens and token in self.special_token_ids)
        ]
        if self._byte_fallback:
            tokens = [self._tokenizer.id_to_token(token) for token in kept]
            return self._tokenizer.decoder.decode(_join_bytes([t for t in tokens if t is not None]))
        return self._tokenizer.decode(kept, skip_special_tokens=False)

    def token_text(self, token_id: int) -> str:
        """See ``Tokenizer.token_text``."""
        if token_id == self.mask_token_id:
            return self._mask_name
        token = self._text_or_none(token_id)
        if token is None:
            return unknown_text(token_id)
        if token_id in self.special_token_ids:
            return token
        if not self._byte_level:
            return token.replace(_WORD_START, " ")
        text = self.decode([token_id], skip_special_tokens=False)
        if REPLACEMENT in text:
            return "".join(
                byte_text(_BYTE_OF_LETTER[c]) if c in _BYTE_OF_LETTER else c for c in token
            )
        return text

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _text_or_none(self, token_id: int) -> str | None:
        return self._tokenizer.id_to_token(token_id) if 0 <= token_id < 2**32 else None


def _join_bytes(tokens: Sequence[str]) -> list[str]:
    """Joins runs of byte tokens into text.

    The package's own decoder throws a whole run away for one wrong byte, so that text already
    streamed would change; here a wrong byte costs no other character.
    """
    joined: list[str] = []
    run = bytearray()
    for token in [*tokens, ""]:
        if _BYTE_TOKEN.fullmatch(token):
            run.append(int(token[3:5], 16))
            continue
        if run:
            joined.append(run.decode(errors="replace"))
            run.clear()
        joined.append(token)
    return joined[:-1]
