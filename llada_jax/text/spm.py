"""Tokenizers in sentencepiece's ``.model`` format."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from llada_jax.text.mask_literal import MaskLiteral
from llada_jax.text.protocol import MASK_TOKEN, TokenizerError, unknown_text, well_formed
from llada_jax.text.special import SpecialNames, agreed_eos_id, agreed_mask_id

_WORD_START = "▁"  # how sentencepiece writes a space
_ROLE_NAMES = ("<role>", "</role>", "<|role_end|>", "<|startoftext|>", "<|endoftext|>")

# NormalizerSpec {add_dummy_prefix: false, remove_extra_whitespaces: false} as field 3 of a
# ModelProto. Protocol buffers merge: appended to a serialized model, it overrides those two.
_KEEP_SPACES = bytes([0x1A, 4, 0x18, 0, 0x20, 0])


class SentencePieceTokenizer:
    """A sentencepiece model, unigram or BPE, with or without byte fallback.

    Special tokens are the model's control pieces, the pieces that ``names`` names, and the marks
    of LLaDA2's chat template where the vocabulary has them. Sentencepiece itself never finds
    control pieces in a text, so the text is cut at the special tokens first; only its beginning
    gets sentencepiece's leading space.

    Args:
      file: the ``.model`` file.
      names: pieces with a meaning. Without a mask there, the piece ``<|mask|>`` is the mask;
        without an end, the model's own end piece (``</s>``).
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
            data = Path(file).read_bytes()
            self._start = sentencepiece.SentencePieceProcessor(model_proto=data)
            self._inside = sentencepiece.SentencePieceProcessor(model_proto=data + _KEEP_SPACES)
        except (OSError, RuntimeError) as error:
            raise TokenizerError(
                f"{file} cannot be read as a sentencepiece model: {error}"
            ) from error
        self.vocab_size: int = self._start.get_piece_size()
        if self.vocab_size == 0:
            raise TokenizerError(
                f"{file} cannot be read as a sentencepiece model: it has no pieces"
            )

        mask = agreed_mask_id(names.mask, mask_token_id, self._id_of, self._text_or_none, file)
        self.mask_token_id: int | None = mask
        own_eos = self._start.eos_id()
        eos_name = names.eos
        if eos_name is None and own_eos >= 0 and not eos_token_ids:
            eos_name = self._start.id_to_piece(own_eos)
        self.eos_token_id: int | None = agreed_eos_id(eos_name, eos_token_ids, self._id_of, file)
        pad = self._id_of(names.pad) if names.pad is not None else None
        self.pad_token_id: int | None = pad if pad is not None else self.eos_token_id

        named = [self._id_of(name) for name in (*names.all(), *_ROLE_NAMES)]
        special = {i for i in range(self.vocab_size) if self._start.is_control(i)}
        special |= {token for token in (*named, mask, self.eos_token_id) if token is not None}
        self.special_token_ids: frozenset[int] = frozenset(special)

        self._mask_name = (self._text_or_none(mask) if mask is not None else None) or MASK_TOKEN
        self._mask_literal = MaskLiteral.of(mask, self._mask_name, self._inside.encode)
        texts = {self._text_or_none(token) for token in special if token != mask} - {None, ""}
        by_length = sorted((re.escape(text) for text in texts if text), key=len, reverse=True)
        self._special = re.compile("(" + "|".join(by_length) + ")") if by_length else None

    def encode(self, text: str) -> list[int]:
        """See ``Tokenizer.encode``."""
        text = well_formed(text)
        pieces = self._special.split(text) if self._special else [text]
        token_ids: list[int] = list(self._start.encode(pieces[0])) if pieces[0] else []
        for name, following in zip(pieces[1::2], pieces[2::2], strict=True):
            token_ids.append(self._start.piece_to_id(name))
            token_ids += self._inside.encode(following)
        return self._mask_literal.spell_out(token_ids)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """See ``Tokenizer.decode``."""
        text: list[str] = []
        run: list[int] = []
        for token in token_ids:
            special = token in self.special_token_ids
            if not 0 <= token < self.vocab_size or (special and skip_special_tokens):
                continue
            if not special:
                run.append(token)
                continue
            # A control piece has no text of its own for sentencepiece: give it its name.
            text += self._decode_run(run, first=not text), self._start.id_to_piece(token)
            run = []
        return "".join((*text, self._decode_run(run, first=not text)))

    def token_text(self, token_id: int) -> str:
        """See ``Tokenizer.token_text``."""
        if token_id == self.mask_token_id:
            return self._mask_name
        text = self._text_or_none(token_id)
        if text is None:
            return unknown_text(token_id)
        return text if token_id in self.special_token_ids else text.replace(_WORD_START, " ")

    def _decode_run(self, token_ids: list[int], *, first: bool) -> str:
        """Text of ordinary tokens; only at the beginning is a leading space sentencepiece's own."""
        return (self._start if first else self._inside).decode(token_ids) if token_ids else ""

    def _id_of(self, name: str) -> int | None:
        token = self._start.piece_to_id(name)
        return token if self._start.id_to_piece(token) == name else None

    def _text_or_none(self, token_id: int) -> str | None:
        return self._start.id_to_piece(token_id) if 0 <= token_id < self.vocab_size else None
