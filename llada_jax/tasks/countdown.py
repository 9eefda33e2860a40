"""Countdown: join given numbers by ``+``, ``-`` and ``*`` so that they make the target.

Reach 22 with 3 5 7
3*5+7=22
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from llada_jax.tasks.expression import Expression
from llada_jax.tasks.problem import Problem, Task, last_line

MAX_TARGET = 999


@dataclasses.dataclass(frozen=True)
class _Level:
    count: int  # how many numbers
    largest: int
    products: bool


_LEVELS = {
    1: _Level(3, 20, False),
    2: _Level(3, 50, False),
    3: _Level(3, 20, True),
    4: _Level(4, 20, False),
    5: _Level(4, 12, True),
}


@dataclasses.dataclass(frozen=True)
class Countdown(Task):
    """Three numbers (four from difficulty 4 on); products at difficulties 3 and 5.

    Every given number is used exactly once, and there are no brackets. Any expression that reaches
    the target is right. The written solutions put the added terms first, the largest in front.
    """

    name: ClassVar[str] = "countdown"
    difficulty: int = 1

    def draw(self, rng: np.random.Generator) -> Problem:
        """Draws numbers and a solution; the target is what it comes to, from 1 to 999."""
        level = _LEVELS[self.difficulty]
        while True:
            numbers = [int(n) for n in rng.integers(1, level.largest + 1, level.count)]
            expression = _expression(rng, numbers, level.products)
            target = expression.value()
            if 1 <= target <= MAX_TARGET:
                break
        given = " ".join(map(str, sorted(numbers)))
        answer = f"{expression}={target}"
        return Problem(f"Reach {target} with {given}", answer, answer)

    def score(self, problem: Problem, text: str) -> float:
        """1.0 if the last line uses each given number once and makes the target.

        ``=`` and the target may be left out; another value after ``=`` is wrong.
        """
        target, _, given = problem.prompt.removeprefix("Reach ").partition(" with ")
        written, equals, value = last_line(text).replace(" ", "").partition("=")
        expression = Expression.parse(written)
        if expression is None or (equals and value != target):
            return 0.0
        used = sorted(map(str, expression.operands)) == sorted(given.split())
        return float(used and str(expression.value()) == target)


def _expression(rng: np.random.Generator, numbers: list[int], products: bool) -> Expression:
    """Groups numbers into terms (products of two at most) and gives the terms signs."""
    terms = [[number] for number in numbers]
    if products:
        pairs = int(rng.integers(1, len(numbers) // 2 + 1))
        terms = [numbers[2 * i : 2 * i + 2] for i in range(pairs)]
        terms += [[number] for number in numbers[2 * pairs :]]
    terms.sort(key=lambda term: (int(np.prod(term)), term), reverse=True)
    added = [True] + [bool(rng.integers(2)) for _ in terms[1:]]
    operands: list[int] = []
    operators: list[str] = []
    ordered = [(term, "+") for term, plus in zip(terms, added, strict=True) if plus]
    ordered += [(term, "-") for term, plus in zip(terms, added, strict=True) if not plus]
    for term, sign in ordered:
        operators += [sign, *["*"] * (len(term) - 1)]
        operands += sorted(term)
    return Expression(tuple(operands), tuple(operators[1:]))
