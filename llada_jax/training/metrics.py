"""The log of a run: one JSON object a line in ``metrics.jsonl``, and trackers beside it.

    {"step": 20, "split": "train", "loss": 3.21, "m2t_loss": 3.3, "grad_norm": 0.8}
    {"step": 20, "split": "validation", "loss": 3.4}

The file is the record; TensorBoard and wandb are copies. A run that is resumed at step S cuts what
it had logged after S before it goes on, so a log has every step once.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import jax
import numpy as np

from llada_jax.training.trackers import MetricsError, Tracker, open_trackers

METRICS_FILE = "metrics.jsonl"

Split = Literal["train", "validation"]


class MetricsLog:
    """Appends metrics to a folder; of several processes only the first writes.

    A value that is not finite is written as ``null`` (JSON has no NaN) and counted.

    Attributes:
      non_finite: how many values that were not finite this object has seen.
    """

    non_finite: int

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        tensorboard: bool = False,
        wandb_project: str | None = None,
        run_name: str | None = None,
        resume_step: int | None = None,
    ):
        """Opens the log, and makes the folder if it is not there.

        Args:
          folder: of the run.
          tensorboard: write event files to ``FOLDER/tensorboard`` too.
          wandb_project: report to this wandb project too.
          run_name: the run's name in wandb; by default that of the folder.
          resume_step: the last step that is still true: lines of later steps are cut. -1 cuts
            all; ``None`` is for a new run.

        Raises:
          MetricsError: if a new run finds a log, or a tracker is not installed.
        """
        self.non_finite = 0
        self._file = None
        self._trackers: list[Tracker] = []
        if jax.process_index() != 0:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / METRICS_FILE
        if resume_step is not None:
            _cut(file, resume_step)
        elif file.is_file() and file.stat().st_size:
            raise MetricsError(
                f"{file} holds the log of an earlier run; resume that run, or choose another folder"
            )
        self._trackers = open_trackers(
            folder,
            tensorboard=tensorboard,
            wandb_project=wandb_project,
            run_name=run_name,
            resume_step=resume_step,
        )
        self._file = file.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, Any], split: Split = "train") -> None:
        """Writes one line, at once; calls after ``close`` are an error.

        Args:
          step: optimizer steps done.
          metrics: numbers, or arrays of one element, by name.
          split: what they were measured on.

        Raises:
          MetricsError: if a name is taken, or a value is no single number.
        """
        arrays = jax.device_get(list(metrics.values()))  # a dictionary would lose its order
        values = {name: _number(name, v) for name, v in zip(metrics, arrays, strict=True)}
        for name in ("step", "split"):
            if name in values:
                raise MetricsError(f"a metric cannot be called {name!r}; choose another name")
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self.non_finite += len(values) - len(finite)
        if jax.process_index() != 0:
            return
        if self._file is None:
            raise MetricsError("the metrics log is closed; open another with resume_step")
        row = {"step": int(step), "split": split} | {name: finite.get(name) for name in values}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.write(int(step), split, finite)

    def close(self) -> None:
        """Ends the log and its trackers."""
        if self._file is not None:
            self._file.close()
            self._file = None
        for tracker in self._trackers:
            tracker.close()
        self._trackers = []

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All lines of a run's log; values that were not finite are ``None``.

    A last line that was only half written when the run was killed is left out.

    Args:
      folder: of the run.

    Raises:
      MetricsError: if there is no log, or it is damaged.
    """
    file = Path(folder) / METRICS_FILE
    if not file.is_file():
        raise MetricsError(f"{file} does not exist; give the folder of a training run")
    return [row for _, row in _lines(file)]


def _lines(file: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Each complete line, as bytes and as what it says."""
    lines: list[tuple[bytes, dict[str, Any]]] = []
    pieces = file.read_bytes().split(b"\n")
    for number, piece in enumerate(pieces, 1):
        if not piece.strip():
            continue
        try:
            row = json.loads(piece)
        except ValueError as error:
            if number == len(pieces):  # no end of line: half-written
                break
            raise MetricsError(
                f"{file}, line {number} is damaged: {error}; remove that line"
            ) from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise MetricsError(
                f"{file}, line {number} is no object with a step; was it written by something else?"
            )
        lines.append((piece, row))
    return lines


def _cut(file: Path, last_step: int) -> None:
    """Drops lines of steps after ``last_step``, and a half-written end; all or nothing."""
    if not file.is_file():
        return
    kept = b"".join(line + b"\n" for line, row in _lines(file) if row["step"] <= last_step)
    if kept == file.read_bytes():
        return
    temporary = file.with_name(f"{file.name}.partial")
    with temporary.open("wb") as out:
        out.write(kept)
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(file)


def _number(name: str, value: Any) -> float | int:
    """A metric as a number with as many digits as its precision has."""
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind in "OSUMmc":
        raise MetricsError(
            f"metric {name!r} must be one number, not {array.dtype} of shape {array.shape}; "
            "reduce it first"
        )
    if array.dtype.kind in "iub":
        return int(array.item())
    if array.dtype == np.float64:
        return float(array.item())
    return float(str(array.astype(np.float32).reshape(())[()]))  # 0.1, not 0.10000000149011612
