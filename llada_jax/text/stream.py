"""Text of a token stream, as soon as it cannot change any more."""

from __future__ import annotations

from collections.abc import Sequence

from llada_jax.text.protocol import REPLACEMENT, Tokenizer

_MAX_PENDING = 3  # bytes that an unfinished UTF-8 character can have
_WINDOW = 128  # tokens kept before the window is cut
_ANCHOR = 8  # tokens that stay as context after a cut


class StreamDecoder:
    """Decodes tokens as they come.

    The pieces that ``push`` and finally ``flush`` return, joined, are ``decode`` of all tokens.
    A character whose bytes are still incomplete is held back, and so the pieces are valid text.

        tokens   ▁na <0xC3>   <0xAF> ve
        pieces   "na" ""      "ï"    "ve"

    Args:
      tokenizer: whose tokens come in.
      skip_special_tokens: leave special tokens out, as in ``decode``.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window: list[int] = []  # the last tokens: all that are not final, and some context
        self._sent = 0  # characters of the window's text that have been returned

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes further tokens.

        Returns:
          The text that became final with them, possibly empty.
        """
        self._window += token_ids
        text = self._decode(self._window)
        final = len(text)
        while final > max(self._sent, len(text) - _MAX_PENDING) and text[final - 1] == REPLACEMENT:
            final -= 1
        piece = text[self._sent : final]
        self._sent = max(self._sent, final)
        if len(self._window) > _WINDOW and self._sent == len(text):
            self._cut(text)
        return piece

    def flush(self) -> str:
        """Ends the stream.

        Returns:
          What was held back. The decoder is then ready for another stream.
        """
        piece = self._decode(self._window)[self._sent :]
        self._window, self._sent = [], 0
        return piece

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)

    def _cut(self, text: str) -> None:
        """Drops old tokens, so that a long stream costs linear time.

        Context stays, because the first word of a text may be written without its space. It must
        show some text and begin at a character: then what follows decodes as before.
        """
        anchor = self._window[-_ANCHOR:]
        context = self._decode(anchor)
        if context and not context.startswith(REPLACEMENT) and text.endswith(context):
            self._window, self._sent = anchor, len(context)
