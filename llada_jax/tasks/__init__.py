"""Generated problems with exact checkers: for training a tiny model, evaluation and rewards."""

from llada_jax.tasks.problem import DIFFICULTIES, Problem, Task, TaskError
from llada_jax.tasks.registry import TASKS, make_task
from llada_jax.tasks.source import TaskSource
from llada_jax.tasks.split import is_held_out

__all__ = [
    "DIFFICULTIES",
    "TASKS",
    "Problem",
    "Task",
    "TaskError",
    "TaskSource",
    "is_held_out",
    "make_task",
]
