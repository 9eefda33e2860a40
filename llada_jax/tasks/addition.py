"""Addition of two numbers, written out column by column from the units.

Add 347+285
7+5=12,4+8+1=13,3+2+1=6
#### 632
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from llada_jax.tasks.problem import ANSWER_MARK, Problem, Task, marked_integer


@dataclasses.dataclass(frozen=True)
class Addition(Task):
    """Two numbers of up to ``difficulty + 1`` digits. The sum is checked, its working is not."""

    name: ClassVar[str] = "addition"

    def draw(self, rng: np.random.Generator) -> Problem:
        """Draws two numbers; the chance of a length is in proportion to it."""
        a, b = (_number(rng, self.difficulty + 1) for _ in range(2))
        answer = str(a + b)
        return Problem(f"Add {a}+{b}", f"{columns(a, b)}\n{ANSWER_MARK} {answer}", answer)

    def score(self, problem: Problem, text: str) -> float:
        """1.0 if the last line is ``####`` and the sum."""
        return float(marked_integer(text) == problem.answer)


def columns(a: int, b: int) -> str:
    """The working: a sum for each column from the units, with the carry as its third term."""
    width = max(len(str(a)), len(str(b)))
    carry, steps = 0, []
    for digit_a, digit_b in zip(
        reversed(str(a).zfill(width)), reversed(str(b).zfill(width)), strict=True
    ):
        total = int(digit_a) + int(digit_b) + carry
        steps.append(f"{digit_a}+{digit_b}{'+1' if carry else ''}={total}")
        carry = total // 10
    return ",".join(steps)


def _number(rng: np.random.Generator, max_digits: int) -> int:
    """A number of 1 to ``max_digits`` digits: uniform within a length, long ones more often."""
    lengths = np.arange(1, max_digits + 1)
    digits = int(rng.choice(lengths, p=lengths / lengths.sum()))
    return int(rng.integers(10 ** (digits - 1) if digits > 1 else 0, 10**digits))
