"""Sums, differences and products of small numbers, reduced one operation a line.

Compute 3+4*2-5
3+8-5
11-5
#### 6
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from llada_jax.tasks.expression import Expression
from llada_jax.tasks.problem import ANSWER_MARK, Problem, Task, marked_integer

MAX_VALUE = 999  # of every intermediate result; none is negative either


@dataclasses.dataclass(frozen=True)
class Arithmetic(Task):
    """``difficulty + 1`` operations. The result is checked, its working is not."""

    name: ClassVar[str] = "arithmetic"
    difficulty: int = 2

    def draw(self, rng: np.random.Generator) -> Problem:
        """Draws an expression whose intermediate results stay within 0 to 999."""
        while True:
            expression = _expression(rng, self.difficulty + 1)
            steps = [expression]
            while steps[-1].operators:
                steps.append(steps[-1].reduce())
            if all(0 <= number <= MAX_VALUE for step in steps for number in step.operands):
                break
        answer = str(steps[-1])
        lines = [*map(str, steps[1:-1]), f"{ANSWER_MARK} {answer}"]
        return Problem(f"Compute {expression}", "\n".join(lines), answer)

    def score(self, problem: Problem, text: str) -> float:
        """1.0 if the last line is ``####`` and the result."""
        return float(marked_integer(text) == problem.answer)


def _expression(rng: np.random.Generator, operations: int) -> Expression:
    """Random operators; factors from 2 to 9, other numbers from 1 to 20."""
    operators = tuple("+-*"[i] for i in rng.integers(0, 3, operations))
    operands = tuple(
        int(rng.integers(2, 10))
        if "*" in operators[max(0, i - 1) : i + 1]
        else int(rng.integers(1, 21))
        for i in range(operations + 1)
    )
    return Expression(operands, operators)
