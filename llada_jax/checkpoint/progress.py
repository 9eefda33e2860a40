"""A progress bar in bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import jax


@contextlib.contextmanager
def byte_progress(description: str, total: int, enabled: bool) -> Iterator[Callable[[int], None]]:
    """Shows a bar on the first process while the body runs.

    Args:
      description: what is going on.
      total: all bytes.
      enabled: whether to show anything.

    Yields:
      A function that is told how many more bytes are done.
    """
    if not enabled or jax.process_index() != 0:
        yield lambda count: None
        return
    from rich import console, progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console.Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total)
        yield lambda count: bar.advance(task, count)
