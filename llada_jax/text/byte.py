"""A tokenizer without a file: UTF-8 bytes and a few special tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence

from llada_jax.text.protocol import MASK_TOKEN, byte_text, unknown_text, well_formed

_NUM_BYTES = 256
_SPECIAL = ("<|endoftext|>", MASK_TOKEN, "<role>", "</role>", "<|role_end|>")
_ID_OF = {name: _NUM_BYTES + i for i, name in enumerate(_SPECIAL)}
# The mask's name is left out: it stays text.
_NAMES = re.compile(
    "(" + "|".join(re.escape(name) for name in _SPECIAL if name != MASK_TOKEN) + ")"
)


class ByteTokenizer:
    """Token id = byte; from 256 on the end, the mask, and the marks of LLaDA2's chat template.

    For small models of one's own: any text round-trips, nothing has to be trained. A model folder
    asks for it with ``{"tokenizer_class": "ByteTokenizer"}`` in its ``tokenizer_config.json``.
    """

    vocab_size: int = _NUM_BYTES + len(_SPECIAL)
    eos_token_id: int = _ID_OF["<|endoftext|>"]
    pad_token_id: int = _ID_OF["<|endoftext|>"]
    mask_token_id: int = _ID_OF[MASK_TOKEN]
    special_token_ids: frozenset[int] = frozenset(_ID_OF.values())

    def encode(self, text: str) -> list[int]:
        """See ``Tokenizer.encode``."""
        token_ids: list[int] = []
        for piece in _NAMES.split(well_formed(text)):
            token_ids += (
                (_ID_OF[piece],) if piece in _ID_OF and piece != MASK_TOKEN else piece.encode()
            )
        return token_ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """See ``Tokenizer.decode``."""
        data = bytearray()
        for token in token_ids:
            if 0 <= token < _NUM_BYTES:
                data.append(token)
            elif token in self.special_token_ids and not skip_special_tokens:
                data += _SPECIAL[token - _NUM_BYTES].encode()
        return data.decode(errors="replace")

    def token_text(self, token_id: int) -> str:
        """See ``Tokenizer.token_text``."""
        if 0 <= token_id < _NUM_BYTES:
            return chr(token_id) if token_id < 0x80 else byte_text(token_id)
        if token_id in self.special_token_ids:
            return _SPECIAL[token_id - _NUM_BYTES]
        return unknown_text(token_id)
