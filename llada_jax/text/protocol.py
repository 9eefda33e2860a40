"""What the rest of the library asks of a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

MASK_TOKEN = "<|mask|>"  # the released tokenizer's name of the mask
REPLACEMENT = "\ufffd"  # stands for bytes that are not UTF-8


class TokenizerError(ValueError):
    """A tokenizer that cannot be used; the message names the file and the way out."""


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back.

    An implementation keeps two promises beyond its types. ``encode`` never returns
    ``mask_token_id``: a mask in the prompt would be taken for a position still to be decided, so
    the mask's own name in a text is spelled out like any other characters. And ``decode`` never
    raises on what a model may emit: ids outside the vocabulary are left out, bytes that are not
    UTF-8 become U+FFFD.
    """

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; a model may have more rows than that."""
        ...

    @property
    def mask_token_id(self) -> int | None:
        """The token that stands for "not decided yet"."""
        ...

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text."""
        ...

    @property
    def pad_token_id(self) -> int | None:
        """The token that fills a row up; ``eos_token_id`` where the tokenizer names none."""
        ...

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Tokens that are not text: mask, end, roles."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Nothing is added at its ends.

        Names of special tokens, except the mask's, become those tokens, as a rendered chat
        template needs it. Lone surrogates become U+FFFD.
        """
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; special tokens by name, or left out."""
        ...

    def token_text(self, token_id: int) -> str:
        """How a trace shows one token: its text, its special name, or its bytes as ``<0xE4>``."""
        ...


def well_formed(text: str) -> str:
    """The text with surrogate pairs joined and lone surrogates replaced, so that it has UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def byte_text(byte: int) -> str:
    """How a trace shows a byte that is no character by itself."""
    return f"<0x{byte:02X}>"


def unknown_text(token_id: int) -> str:
    """How a trace shows an id that the vocabulary lacks."""
    return f"<unused {token_id}>"
