"""What all figures share: colours, and matplotlib as an optional package."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# Okabe and Ito: told apart with every common kind of colour vision. The second row is for dark
# backgrounds: the same hues, lighter.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
DARK_COLOURS = ("#4FB0EA", "#FF8A4C", "#2FC79A", "#E3A0C6", "#F2B93B", "#9AD6F7", "#DDDDDD")

_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.labelcolor": "#333333",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "savefig.dpi": 150,
    "svg.hashsalt": "llada_jax",  # the same figure gives the same file
    "svg.fonttype": "none",
}


class FigureError(ValueError):
    """A figure that cannot be drawn; the message says what to do instead."""


def colour(index: int) -> str:
    """The colour of the n-th thing; they repeat after seven."""
    return COLOURS[index % len(COLOURS)]


def style() -> Any:
    """A context in which figures are made and saved.

    Raises:
      FigureError: if matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise FigureError(
            f'pictures need matplotlib, which is not installed ({error}): pip install "llada-jax'
            '[viz]"; `llada-jax viz --format html` works without it'
        ) from error
    return matplotlib.rc_context(_STYLE)


def save(figure: Any, file: str | os.PathLike[str]) -> Path:
    """Saves a figure as PNG or SVG, by the ending of ``file``; makes its folder.

    Raises:
      FigureError: if the ending is another one.
    """
    file = Path(file)
    kind = file.suffix.lower().lstrip(".")
    if kind not in ("png", "svg"):
        raise FigureError(f"{file} must end in .png or .svg")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return file
