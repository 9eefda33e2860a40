"""What a task is: problems drawn from a random generator, and a checker for answers.

A task writes its own training data (prompt and worked solution) and judges any text, so the same
code serves training, evaluation and rewards. Checkers parse; they never execute what they read.
"""

from __future__ import annotations

import abc
import dataclasses
import re
from typing import ClassVar

import numpy as np

from llada_jax.tasks.split import is_held_out

DIFFICULTIES = (1, 2, 3, 4, 5)
ANSWER_MARK = "####"  # before the final answer, when working comes first (after GSM8K)

_MAX_DRAWS = 10_000
_MARKED_INTEGER = re.compile(rf"{ANSWER_MARK} *(-?[0-9]+)")


class TaskError(ValueError):
    """A task, difficulty or mixture that does not exist; the message names the way out."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """One generated problem.

    Attributes:
      prompt: what the user says.
      solution: what a good assistant replies, working included.
      answer: the part of the solution that the checker looks for.
    """

    prompt: str
    solution: str
    answer: str

    @property
    def messages(self) -> list[dict[str, str]]:
        """The problem as a conversation: the user's turn and the assistant's."""
        return [
            {"role": "user", "content": self.prompt},
            {"role": "assistant", "content": self.solution},
        ]


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """A source of problems of one kind.

    Attributes:
      name: the task's name, as in ``TASKS``.
      difficulty: from 1 (easy) to 5 (hard); what it means is the task's.
    """

    name: ClassVar[str]
    difficulty: int = 3

    def __post_init__(self):
        if self.difficulty not in DIFFICULTIES:
            raise TaskError(
                f"difficulty = {self.difficulty} of task {self.name!r} does not exist; "
                f"use 1 (easy) to 5 (hard)"
            )

    @abc.abstractmethod
    def draw(self, rng: np.random.Generator) -> Problem:
        """Draws a problem, whatever its split; ``sample`` is what callers want."""

    @abc.abstractmethod
    def score(self, problem: Problem, text: str) -> float:
        """Judges an answer.

        Args:
          problem: a problem of this task.
          text: what the model wrote; any text at all.

        Returns:
          A number from 0 (wrong) to 1 (exact).
        """

    def sample(self, rng: np.random.Generator, split: str | None = None) -> Problem:
        """Draws a problem.

        Args:
          rng: where randomness comes from; the same state gives the same problem.
          split: ``"train"`` and ``"test"`` never give the same prompt; ``None`` gives both.

        Returns:
          The problem.

        Raises:
          TaskError: for another split.
        """
        if split not in ("train", "test", None):
            raise TaskError(f"split = {split!r} does not exist; use 'train', 'test' or None")
        for _ in range(_MAX_DRAWS):
            problem = self.draw(rng)
            if split is None or is_held_out(problem.prompt) == (split == "test"):
                return problem
        raise TaskError(f"task {self.name!r} of difficulty {self.difficulty} has no {split} split")


def last_line(text: str) -> str:
    """The last line of a text that is not blank, without the space around it."""
    return text.strip().rsplit("\n", 1)[-1].strip()


def marked_integer(text: str) -> str | None:
    """The integer on a last line of the form ``#### 632``, as written; ``None`` without one."""
    match = _MARKED_INTEGER.fullmatch(last_line(text))
    return match[1] if match else None
