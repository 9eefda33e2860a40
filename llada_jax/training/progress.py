"""What a training run shows on the standard error while it works.

On a terminal a bar with a line of numbers below it; elsewhere (a file, a batch system) one plain
line every so many steps:

    step 120/1000  loss 3.2104  m2t 3.3021  t2t 1.2010  12.3k tokens/s  MFU 31.2%  0:41:10 left
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

_WINDOW = 50  # updates that the time left is estimated from

# Names in the metrics; tokens are clean ones (L, not 2 L), mfu is a share of the peak.
_LOSSES = ("loss", "m2t", "t2t", "keep")
_SPEED = "tokens_per_second"
_MFU = "mfu"


class TrainingProgress:
    """Shows step, losses, speed and time left.

    Used as a context manager; outside of it updates show nothing.
    """

    def __init__(self, total_steps: int, start_step: int, enabled: bool, every: int):
        """Prepares the display.

        Args:
          total_steps: of the whole run.
          start_step: steps that are done already.
          enabled: whether to show anything (on one process of a run only).
          every: steps between two lines, where the standard error is no terminal.
        """
        self._total = total_steps
        self._every = max(1, every)
        self._enabled = enabled
        self._marks = deque([(time.monotonic(), start_step)], maxlen=_WINDOW)
        self._start = start_step
        self._stream: TextIO | None = None
        self._bar: _Bar | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> TrainingProgress:
        if not self._enabled:
            return self
        if not sys.stderr.isatty():
            self._stream = sys.stderr
            return self
        self._bar = _Bar(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            console=Console(stderr=True),
            expand=True,
        )
        self._task = self._bar.add_task(
            "", total=self._total, completed=self._start, left="compiling"
        )
        self._bar.start()
        return self

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Tells how far the run is.

        Args:
          step: steps done.
          metrics: what is known by name; see the table in this file for what is shown.
        """
        if self._stream is None and self._bar is None:
            return
        left = self._time_left(step)
        if self._bar is not None and self._task is not None:
            self._bar.numbers = "  ".join(numbers(metrics))
            self._bar.update(self._task, completed=step, left=left)
        elif self._stream is not None and (step % self._every == 0 or step >= self._total):
            words = (f"step {step}/{self._total}", *numbers(metrics), left)
            print("  ".join(word for word in words if word), file=self._stream, flush=True)

    def _time_left(self, step: int) -> str:
        """Estimated from the last updates; the first interval, which compiles, does not count."""
        self._marks.append((time.monotonic(), step))
        marks = list(self._marks)
        if marks[0][1] == self._start and len(marks) > 2:
            marks = marks[1:]
        (before, first), (now, last) = marks[0], marks[-1]
        if last <= first:
            return ""
        return f"{_clock((now - before) / (last - first) * max(0, self._total - step))} left"

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._stream = None


class _Bar(Progress):
    """A bar with a line of numbers below it, cut at the terminal's width."""

    numbers = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar, then the numbers."""
        yield self.make_tasks_table(self.tasks)
        yield Text(self.numbers, no_wrap=True, overflow="ellipsis")


def numbers(metrics: Mapping[str, Any]) -> list[str]:
    """The metrics that people watch, formatted: ``["loss 3.2104", "12.3k tokens/s", …]``.

    Kinds of tokens that did not occur (NaN) are left out.
    """
    losses = {name: float(metrics[name]) for name in _LOSSES if name in metrics}
    words = [
        f"{name} {value:.4f}"
        for name, value in losses.items()
        if name == "loss" or math.isfinite(value)
    ]
    if _SPEED in metrics:
        words.append(f"{_short(float(metrics[_SPEED]))} tokens/s")
    if _MFU in metrics:
        words.append(f"MFU {float(metrics[_MFU]):.1%}")
    return words


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{letter}"
    return f"{value:.0f}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
