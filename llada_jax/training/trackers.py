"""Copies of the metrics for TensorBoard and wandb; both packages are optional."""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

_WANDB_ID = "wandb_run_id.txt"


class MetricsError(ValueError):
    """Metrics that cannot be written or read; the message says what to do instead."""


@runtime_checkable
class Tracker(Protocol):
    """Something that metrics are shown to."""

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Shows finite values."""
        ...

    def close(self) -> None:
        """Says that nothing more comes."""
        ...


def open_trackers(
    folder: Path,
    *,
    tensorboard: bool,
    wandb_project: str | None,
    run_name: str | None,
    resume_step: int | None,
) -> list[Tracker]:
    """The trackers that were asked for; arguments as for ``MetricsLog``.

    Raises:
      MetricsError: if one is not installed.
    """
    board = _package("tensorboardX", "tensorboard=true") if tensorboard else None
    wandb = _package("wandb", "wandb_project") if wandb_project else None
    trackers: list[Tracker] = []
    if board:
        trackers.append(TensorBoard(board, folder / "tensorboard", resume_step))
    if wandb and wandb_project:
        name = run_name or folder.absolute().name
        trackers.append(Wandb(wandb, folder, wandb_project, name, resume_step))
    return trackers


def _package(name: str, option: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MetricsError(
            f"{option} needs {name}, which is not installed ({error}): "
            'pip install "llada-jax[tracking]", or leave the option out'
        ) from error


class TensorBoard:
    """Event files; a resumed run hides what it had logged after the step it goes on from."""

    def __init__(self, package: Any, folder: Path, resume_step: int | None):
        purge = None if resume_step is None else resume_step + 1
        suffix = f".{uuid.uuid4().hex[:8]}"  # two starts within a second are two files
        self._writer = package.SummaryWriter(
            str(folder), purge_step=purge, flush_secs=10, filename_suffix=suffix
        )

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Adds scalars ``split/name``."""
        for name, value in values.items():
            self._writer.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        """Flushes."""
        self._writer.close()


class Wandb:
    """A wandb run; its id is kept in the folder, so that a resumed run goes on in the same one.

    wandb takes no step twice: what a resumed run repeats is left out there.
    """

    def __init__(
        self, package: Any, folder: Path, project: str, name: str, resume_step: int | None
    ):
        file = folder / _WANDB_ID
        if resume_step is not None and resume_step >= 0 and file.is_file():
            run_id = file.read_text(encoding="utf-8").strip()
        else:
            run_id = uuid.uuid4().hex[:12]
            file.write_text(run_id + "\n", encoding="utf-8")
        self._run = package.init(
            project=project, name=name, id=run_id, resume="allow", dir=str(folder)
        )

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Logs ``split/name``."""
        self._run.log({f"{split}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """Finishes the run."""
        self._run.finish()
