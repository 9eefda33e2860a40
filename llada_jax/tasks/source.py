"""Training data without a file: conversations that are computed from their index."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np

from llada_jax.tasks.problem import Problem, Task, TaskError
from llada_jax.tasks.registry import TASKS, make_task


class TaskSource:
    """A random-access sequence of conversations (grain's ``RandomAccessDataSource``).

    Element ``i`` depends on the seed, the mixture and ``i`` alone, so readers can shuffle, shard
    and resume as they like.

    Example:
      >>> source = TaskSource({"addition": 2, "sudoku": 1}, difficulties={"sudoku": [1, 2, 3]})
      >>> source[0]["messages"]
    """

    def __init__(
        self,
        mixture: Mapping[str, int | float] | Sequence[str] | None = None,
        *,
        difficulties: Mapping[str, int | Sequence[int]] | None = None,
        seed: int = 0,
        split: str | None = "train",
        size: int = 1_000_000,
    ):
        """Describes the sequence.

        Args:
          mixture: weights by task name, or names for equal weights; ``None`` for every task.
          difficulties: by task name, one or several to draw from evenly. A task that is left out
            has its default difficulty.
          seed: another seed gives other problems.
          split: ``"train"``, ``"test"`` or ``None`` for both.
          size: the sequence's length.

        Raises:
          TaskError: for an unknown task, difficulty or split, or weights that are not positive.
        """
        if mixture is None:
            mixture = TASKS
        if isinstance(mixture, str):
            mixture = [mixture]
        if not isinstance(mixture, Mapping):
            mixture = dict.fromkeys(mixture, 1.0)
        difficulties = dict(difficulties or {})
        for name in difficulties:
            make_task(name)
            if name not in mixture:
                raise TaskError(f"difficulties name {name!r}, which the mixture does not hold")
        if not mixture or min(mixture.values()) <= 0:
            raise TaskError(f"mixture = {dict(mixture)} needs positive weights; leave others out")
        if seed < 0 or size < 1:
            raise TaskError(f"seed = {seed} must not be negative, size = {size} must be positive")
        if split not in ("train", "test", None):
            raise TaskError(f"split = {split!r} does not exist; use 'train', 'test' or None")
        self._tasks = [_levels(name, difficulties.get(name)) for name in mixture]
        weights = np.array(list(mixture.values()), np.float64)
        self._edges = np.cumsum(weights / weights.sum())[:-1]
        self._seed = seed
        self._split = split
        self._size = size
        self._description = f"TaskSource({dict(mixture)}, {difficulties}, {seed=}, {split=})"

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        return {"messages": self.problem(index)[1].messages}

    def __repr__(self) -> str:
        return self._description  # grain compares it when an iterator is restored

    def problem(self, index: SupportsIndex) -> tuple[Task, Problem]:
        """The problem behind a conversation, and the task that scores it.

        Args:
          index: from ``-len(self)`` to ``len(self) - 1``.

        Raises:
          IndexError: outside that range.
        """
        at = operator.index(index)
        if not -self._size <= at < self._size:
            raise IndexError(f"index {at} is outside a TaskSource of {self._size} elements")
        rng = np.random.default_rng((self._seed, at % self._size))
        levels = self._tasks[int(np.searchsorted(self._edges, rng.random(), side="right"))]
        task = levels[int(rng.integers(len(levels)))]
        return task, task.sample(rng, self._split)


def _levels(name: str, difficulties: int | Sequence[int] | None) -> list[Task]:
    """A task at the difficulties that are asked for."""
    if difficulties is None or isinstance(difficulties, int):
        return [make_task(name, difficulties)]
    if not difficulties:
        raise TaskError(f"difficulties of {name!r} are empty; give at least one from 1 to 5")
    return [make_task(name, int(difficulty)) for difficulty in difficulties]
