"""One token of a draft on the screen: its text, what became of it, how that looks.

A row of tokens is drawn with a row of markers below it, so that the states can be told apart
without colour as well, and the text itself stays as it is:

    17,18,19,20,21,22,2░,░4,
    ············++++++~ +
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from llada_jax.text import Tokenizer
from llada_jax.viz.escape import escape_controls

_TAB = "    "


class State(enum.Enum):
    """What a position of the draft is, after a forward pass."""

    PROMPT = enum.auto()
    MASKED = enum.auto()
    FILLED = enum.auto()  # by this forward pass
    EDITED = enum.auto()  # by this forward pass
    EARLIER = enum.auto()  # filled before


# Okabe and Ito's blue and vermillion: told apart with every kind of colour vision, and readable on
# black and on white.
STYLES = {
    State.PROMPT: "grey50",
    State.MASKED: "grey50",
    State.FILLED: "bold #0072B2",
    State.EDITED: "underline #D55E00",
    State.EARLIER: "",
}


@dataclasses.dataclass(frozen=True)
class Glyphs:
    """The signs that are not text of the model.

    Attributes:
      mask: stands for a masked position.
      newline: shows a line break whose state matters.
      markers: the sign below a token, by its state; a space where there is none.
    """

    mask: str
    newline: str
    markers: dict[State, str]

    @classmethod
    def of(cls, console: Console) -> Glyphs:
        """Plain ASCII where the console can show no more."""
        unicode = console.encoding.lower().startswith("utf")
        return cls(
            mask="░" if unicode else "_",
            newline="↵" if unicode else "\\n",
            markers={
                State.PROMPT: "·" if unicode else ".",
                State.MASKED: " ",
                State.FILLED: "+",
                State.EDITED: "~",
                State.EARLIER: " ",
            },
        )

    def legend(self) -> Text:
        """One line that explains masks and markers; 36 columns."""
        line = Text(no_wrap=True, overflow="crop")
        line.append(self.mask, STYLES[State.MASKED]).append(" masked ")
        for state, word in (
            (State.FILLED, "filled"),
            (State.EDITED, "edited"),
            (State.PROMPT, "prompt"),
        ):
            line.append(self.markers[state], STYLES[state]).append(f" {word} ")
        line.right_crop(1)
        return line


@dataclasses.dataclass(frozen=True)
class Cell:
    """One token."""

    text: str
    state: State


def token_cell(token: int, state: State, tokenizer: Tokenizer | None, glyphs: Glyphs) -> Cell:
    """How a token appears; by its number where there is no tokenizer."""
    if tokenizer is None:
        return Cell(f"{glyphs.mask if state is State.MASKED else token} ", state)
    if state is State.MASKED:
        return Cell(glyphs.mask, state)
    return Cell(tokenizer.token_text(token) or f"<{token}>", state)


def one_line(cells: Sequence[Cell], glyphs: Glyphs) -> list[Cell]:
    """The same tokens with line breaks as signs."""
    return [
        dataclasses.replace(cell, text=cell.text.replace("\n", glyphs.newline)) for cell in cells
    ]


def wrap(cells: Sequence[Cell], width: int, glyphs: Glyphs) -> list[list[Cell]]:
    """Lays tokens out in rows of at most ``width`` columns, with their own line breaks.

    A line break that was written by this forward pass also gets a sign. A text that ends with a
    line break ends with an empty row.
    """
    rows: list[list[Cell]] = [[]]
    column = 0
    for text, state in _characters(cells, glyphs):
        if text == "\n":
            rows.append([])
            column = 0
            continue
        columns = cell_len(text)
        if column + columns > width and rows[-1]:
            rows.append([])
            column = 0
        rows[-1].append(Cell(text, state))
        column += columns
    return rows


def _characters(cells: Sequence[Cell], glyphs: Glyphs) -> Iterator[tuple[str, State]]:
    for cell in cells:
        for character in escape_controls(cell.text).replace("\t", _TAB):
            if character == "\n" and cell.state in (State.FILLED, State.EDITED):
                for sign in glyphs.newline:
                    yield sign, cell.state
            yield character, cell.state


def draw_row(row: Sequence[Cell]) -> Text:
    """The tokens of one row."""
    return _draw([(cell.text, cell.state) for cell in row])


def draw_markers(row: Sequence[Cell], glyphs: Glyphs) -> Text:
    """The markers below one row."""
    line = _draw([(glyphs.markers[c.state] * cell_len(c.text), c.state) for c in row])
    line.rstrip()
    return line


def _draw(pieces: Sequence[tuple[str, State]]) -> Text:
    line = Text(no_wrap=True, overflow="ignore")
    for state, run in itertools.groupby(pieces, key=lambda piece: piece[1]):
        line.append("".join(text for text, _ in run), STYLES[state])
    return line
