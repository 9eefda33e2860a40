"""What an evaluation finds."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """One task, one model, one way of decoding.

    Attributes:
      task, difficulty: what was asked.
      scores: of each problem, from 0 to 1.
      num_tokens: generated tokens of all problems, stop tokens included.
      num_forwards: denoising forwards, summed over the problems.
      num_edits: tokens that were rewritten on the way.
      num_stopped: answers that ended with a stop token, not with ``max_tokens``.
      seconds: time to decode them, without compilation.
      device: what it ran on.
    """

    task: str
    difficulty: int
    scores: tuple[float, ...]
    num_tokens: int
    num_forwards: int
    num_edits: int
    num_stopped: int
    seconds: float
    device: str

    @property
    def n(self) -> int:
        """How many problems."""
        return len(self.scores)

    @property
    def accuracy(self) -> float:
        """The mean score."""
        return statistics.fmean(self.scores)

    @property
    def stderr(self) -> float:
        """The standard error of ``accuracy``; 0 for a single problem."""
        return statistics.stdev(self.scores) / self.n**0.5 if self.n > 1 else 0.0

    @property
    def tokens_per_forward(self) -> float:
        """All tokens over all denoising forwards."""
        return self.num_tokens / max(self.num_forwards, 1)

    @property
    def tokens_per_second(self) -> float:
        """All tokens over the time of all batches."""
        return self.num_tokens / self.seconds

    @property
    def edits_per_token(self) -> float:
        """How often a token was rewritten, on average."""
        return self.num_edits / max(self.num_tokens, 1)

    def to_json(self) -> dict[str, Any]:
        """What ``llada-jax eval --json`` prints."""
        return {
            "task": self.task,
            "difficulty": self.difficulty,
            "n": self.n,
            "accuracy": self.accuracy,
            "stderr": self.stderr,
            "tokens_per_forward": self.tokens_per_forward,
            "tokens_per_second": self.tokens_per_second,
            "edits_per_token": self.edits_per_token,
            "num_tokens": self.num_tokens,
            "num_forwards": self.num_forwards,
            "num_edits": self.num_edits,
            "num_stopped": self.num_stopped,
            "seconds": self.seconds,
            "device": self.device,
        }


def mean_of(results: Sequence[TaskResult]) -> dict[str, Any]:
    """The mean over tasks, each with the same weight.

    Args:
      results: one a task, at least one.

    Returns:
      An object like those of the tasks, whose ``task`` is ``"mean"``; its ``n`` is the total, and
      its ``stderr`` that of the mean accuracy.
    """
    means = {
        name: statistics.fmean(getattr(result, name) for result in results)
        for name in ("accuracy", "tokens_per_forward", "tokens_per_second", "edits_per_token")
    }
    stderr = sum(result.stderr**2 for result in results) ** 0.5 / len(results)
    return {
        "task": "mean",
        "n": sum(result.n for result in results),
        "accuracy": means.pop("accuracy"),
        "stderr": stderr,
        **means,
    }
