"""The tasks by name."""

from __future__ import annotations

import difflib

from llada_jax.tasks.addition import Addition
from llada_jax.tasks.arithmetic import Arithmetic
from llada_jax.tasks.countdown import Countdown
from llada_jax.tasks.editing import Editing
from llada_jax.tasks.problem import Task, TaskError
from llada_jax.tasks.sudoku import Sudoku

_CLASSES: dict[str, type[Task]] = {
    task.name: task for task in (Addition, Arithmetic, Sudoku, Countdown, Editing)
}
TASKS: tuple[str, ...] = tuple(_CLASSES)


def make_task(name: str, difficulty: int | None = None) -> Task:
    """Makes a task by name.

    Args:
      name: one of ``TASKS``.
      difficulty: 1 (easy) to 5 (hard); ``None`` for the task's own default.

    Returns:
      The task.

    Raises:
      TaskError: for an unknown name (the message names the nearest) or difficulty.
    """
    if name not in _CLASSES:
        near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(TASKS)}"
        raise TaskError(f"there is no task {name!r}; {hint}")
    return _CLASSES[name]() if difficulty is None else _CLASSES[name](difficulty)
