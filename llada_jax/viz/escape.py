"""Text from a model, made safe for a terminal."""

from __future__ import annotations

import unicodedata

_JOINERS = "\u200c\u200d"  # needed inside words of some scripts, and inside emoji
_UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, invisible formats, surrogates, separators


def escape_controls(text: str, keep: str = "\n\t") -> str:
    r"""Spells out what a terminal would obey or hide: ``"\x1b[2J"`` becomes ``"\\x1b[2J"``.

    Covers escape sequences (also the 8-bit ones), carriage returns, and invisible characters that
    turn the direction of writing.

    Args:
      text: anything.
      keep: control characters that may stay.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in keep or not _is_unsafe(c) else _spelled(c) for c in text)


def _is_unsafe(character: str) -> bool:
    return unicodedata.category(character) in _UNSAFE and character not in _JOINERS


def _spelled(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
