"""How often a model solves generated problems, and what that costs in forward passes and time."""

from llada_jax.eval.evaluate import EvalError, evaluate, held_out_problems
from llada_jax.eval.result import TaskResult, mean_of

__all__ = ["EvalError", "TaskResult", "evaluate", "held_out_problems", "mean_of"]
