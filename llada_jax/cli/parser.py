"""Argument parsing that reports like the rest of the program: one line, and the way out."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import NoReturn


class UsageError(ValueError):
    """A command line that cannot be understood."""


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` without abbreviations that raises ``UsageError``."""

    def __init__(self, prog: str, description: str | None = None):
        super().__init__(
            prog=prog,
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage and leaving."""
        raise UsageError(f"{message}; see `{self.prog} --help`")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parses; an unknown option is reported with the nearest known one."""
        parsed, unknown = self.parse_known_intermixed_args(arguments)
        if unknown:
            option = unknown[0].split("=")[0]
            if not option.startswith("-"):
                self.error(f"unexpected argument {option!r}")
            known = [name for action in self._actions for name in action.option_strings]
            self.error(f"unknown option {option!r}{did_you_mean(option, known)}")
        return parsed


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """``"; did you mean 'x'?"``, or nothing if no known word is near."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f", did you mean {near[0]!r}?" if near else ""


def positive_int(text: str) -> int:
    """An argument type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def token_ids(text: str) -> list[int]:
    """An argument type: numbers with commas or spaces between them."""
    try:
        ids = [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be token ids with commas between them, such as 1,2,3"
        ) from None
    return ids
