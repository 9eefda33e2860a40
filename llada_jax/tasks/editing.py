"""Editing: copy a text with every occurrence of some letters or syllables replaced.

Replace a->o, ki->lu: kafo meki
kofo melu
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import ClassVar

import numpy as np

from llada_jax.tasks.problem import Problem, Task

CONSONANTS = "bdfgklmnprst"
VOWELS = "aeiou"
WORDS = {1: 2, 2: 3, 3: 4, 4: 5, 5: 7}
RULES = {1: 1, 2: 1, 3: 2, 4: 2, 5: 3}

Rule = tuple[str, str]  # what is replaced, and by what


@dataclasses.dataclass(frozen=True)
class Editing(Task):
    """Two to seven made-up words and one to three rules; an answer is a copy, letter by letter.

    Every rule applies somewhere, and the order of the rules does not matter.
    """

    name: ClassVar[str] = "editing"
    difficulty: int = 2

    def draw(self, rng: np.random.Generator) -> Problem:
        """Draws words and rules until all rules apply and their order does not matter."""
        while True:
            words = [_word(rng) for _ in range(WORDS[self.difficulty])]
            text = " ".join(words)
            rules = [_rule(rng, words) for _ in range(RULES[self.difficulty])]
            results = {apply(order, text) for order in itertools.permutations(rules)}
            if len({old for old, _ in rules}) == len(rules) and len(results) == 1:
                break
        answer = results.pop()
        listed = ", ".join(f"{old}->{new}" for old, new in rules)
        return Problem(f"Replace {listed}: {text}", answer, answer)

    def score(self, problem: Problem, text: str) -> float:
        """1.0 if the text, but for the space around it, is the edited copy."""
        return float(text.strip() == problem.answer)


def apply(rules: Iterable[Rule], text: str) -> str:
    """Applies rules to a text, one after another."""
    for old, new in rules:
        text = text.replace(old, new)
    return text


def _syllable(rng: np.random.Generator) -> str:
    return CONSONANTS[rng.integers(len(CONSONANTS))] + VOWELS[rng.integers(len(VOWELS))]


def _word(rng: np.random.Generator) -> str:
    return "".join(_syllable(rng) for _ in range(rng.integers(2, 4)))


def _rule(rng: np.random.Generator, words: list[str]) -> Rule:
    """Replaces a syllable of the text, or one of its letters by one of the same kind."""
    word = words[rng.integers(len(words))]
    at = 2 * int(rng.integers(len(word) // 2))
    while True:
        new = _syllable(rng)
        kind = int(rng.integers(4))  # a consonant, a vowel, a syllable, a syllable
        part = slice(kind, kind + 1) if kind < 2 else slice(0, 2)
        old, new = word[at : at + 2][part], new[part]
        if old != new:
            return old, new
