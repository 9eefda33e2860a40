"""The screen's idea of one row: finished text, and the block that is still a draft."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from llada_jax.decoding import Phase, TraceStep
from llada_jax.text import StreamDecoder, Tokenizer
from llada_jax.viz.cells import Cell, Glyphs, State, draw_markers, draw_row, token_cell, wrap

_PROMPT_SHOWN = 400  # characters of a long prompt that are shown, its last ones


class BlockView:
    """Follows the steps of one row and draws where it stands.

    Only what may still change is drawn anew. Text that has become final leaves the view row by
    row, through ``finish``; its last, incomplete row stays, and the draft goes on behind it.

    Args:
      prompt: the prompt's token ids.
      block_length: C.
      mask_token_id: the id that stands for a position not yet filled.
      tokenizer: ``None`` to show token ids.
      width: columns.
      glyphs: the signs to use.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        block_length: int,
        mask_token_id: int,
        tokenizer: Tokenizer | None,
        width: int,
        glyphs: Glyphs,
    ):
        self.forwards = 0
        self.block_index = len(prompt) // block_length
        self._prompt_length = len(prompt)
        self._mask_token_id = mask_token_id
        self._tokenizer = tokenizer
        self._width = width
        self._glyphs = glyphs
        self._canvas = list(prompt)
        self._unmasked: set[int] = set()  # positions that the last step filled
        self._edited: set[int] = set()
        self._live_from = len(prompt) // block_length * block_length  # first position drawn live
        self._prompt_text = TextSoFar(tokenizer, skip_special_tokens=False)
        opening = self._prompt_text.push(prompt[: self._live_from])
        if len(opening) > _PROMPT_SHOWN:
            opening = "..." + opening[-_PROMPT_SHOWN:]
        rows = wrap([Cell(opening, State.PROMPT)], width, glyphs)
        self.opening = [draw_row(row) for row in rows[:-1]]  # to be printed above the view
        self._partial = rows[-1]  # the last row of finished text, incomplete

    def step(self, step: TraceStep) -> None:
        """Takes one forward pass."""
        self.forwards += step.phase in (Phase.DENOISE, Phase.EDIT_WINDOW)
        self.block_index = step.block_index
        end = step.start + len(step.after)
        self._canvas += [self._mask_token_id] * (end - len(self._canvas))  # nothing if it is longer
        self._canvas[step.start : end] = step.after.tolist()
        self._unmasked = {step.start + int(i) for i in step.unmasked.nonzero()[0]}
        self._edited = {step.start + int(i) for i in step.edited.nonzero()[0]}

    def tokens(self, start: int, stop: int) -> list[int]:
        """The canvas between two positions, as far as it has been reached."""
        return self._canvas[start:stop]

    def finish(self, upto: int, text: str) -> list[Text]:
        """The generated tokens before position ``upto`` are final.

        Args:
          upto: first position that may still change.
          text: their text, beyond that of earlier calls.

        Returns:
          Rows that are complete now, to be printed above the view.
        """
        tail = self._canvas[self._live_from : self._prompt_length]
        self._live_from = max(upto, self._live_from)
        self._unmasked, self._edited = set(), set()
        if tail:
            shown = self._prompt_text.push(tail) + self._prompt_text.flush()
            self._partial = [*self._partial, Cell(shown, State.PROMPT)]
        *complete, self._partial = wrap(
            [*self._partial, Cell(text, State.EARLIER)], self._width, self._glyphs
        )
        return [draw_row(row) for row in complete]

    def skip_to(self, position: int) -> None:
        """Leaves out everything before ``position``."""
        self._live_from, self._partial = position, []

    def cells(self) -> list[Cell]:
        """The tokens that may still change."""
        return [
            token_cell(token, self._state(position, token), self._tokenizer, self._glyphs)
            for position, token in enumerate(self._canvas)
            if position >= self._live_from
        ]

    def draft(self, max_rows: int | None = None) -> Text:
        """The incomplete row and the draft, with markers; at most the last ``max_rows`` rows."""
        rows = wrap([*self._partial, *self.cells()], self._width, self._glyphs)
        lines = [line for row in rows for line in (draw_row(row), draw_markers(row, self._glyphs))]
        if max_rows is not None and len(lines) > max_rows:
            lines = lines[-(max_rows // 2 * 2) :]
        return Text("\n").join(lines)

    def rest(self) -> Text:
        """The last row of the finished text."""
        return draw_row(self._partial)

    def _state(self, position: int, token: int) -> State:
        if position < self._prompt_length:
            return State.PROMPT
        if token == self._mask_token_id:
            return State.MASKED
        if position in self._edited:
            return State.EDITED
        return State.FILLED if position in self._unmasked else State.EARLIER


class TextSoFar:
    """Turns tokens that become final into text, piece by piece.

    Args:
      tokenizer: ``None`` writes ids with a space behind each.
      skip_special_tokens: leave special tokens out.
    """

    def __init__(self, tokenizer: Tokenizer | None, *, skip_special_tokens: bool = True):
        self._decoder = (
            StreamDecoder(tokenizer, skip_special_tokens=skip_special_tokens)
            if tokenizer is not None
            else None
        )

    def push(self, tokens: Sequence[int]) -> str:
        """The text that further tokens complete."""
        if self._decoder is None:
            return "".join(f"{token} " for token in tokens)
        return self._decoder.push(tokens)

    def flush(self) -> str:
        """What was held back; the next text begins anew."""
        return "" if self._decoder is None else self._decoder.flush()
