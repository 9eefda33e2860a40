"""Averaging the weights of checkpoints of one training run.

After a learning rate that stays constant, the mean of the last or best checkpoints takes the place
of a decay phase. The sum is built in float32, one checkpoint after the other, so two models are in
host memory at a time: the sum and the one that is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from llada_jax.checkpoint import (
    CheckpointError,
    companion_files,
    is_native,
    load_checkpoint,
    read_config,
    read_source_config,
    save_hf,
    stored_dtypes,
    stored_quantization,
)
from llada_jax.checkpoint.folder import list_tensors
from llada_jax.checkpoint.keys import uses_merged_experts
from llada_jax.checkpoint.staging import refuse_existing
from llada_jax.config import ModelConfig

BEST_FOLDER = "best"
VALIDATION_FILE = "validation.json"

_CHUNK = 1 << 24  # elements that are converted at a time

_Path = str | os.PathLike[str]


class MergeError(ValueError):
    """Checkpoints that cannot be averaged; the message says why."""


def merge(
    out: _Path,
    folders: Sequence[_Path],
    *,
    weights: Sequence[float] | None = None,
    progress: bool = False,
) -> None:
    """Writes the mean of checkpoints, in the Hugging Face layout.

    Every weight is averaged, the experts' balancing biases too. Precision, expert layout,
    ``config.json`` and tokenizer files are those of the first checkpoint.

    Args:
      out: the folder to create.
      folders: Hugging Face or native checkpoints of one model configuration.
      weights: how much each counts; they need not add up to 1. By default all count the same.
      progress: show bars.

    Raises:
      MergeError: if there is nothing to average, or configurations or weights do not fit.
      CheckpointError: if a checkpoint cannot be read, or ``out`` exists.
    """
    shares = _shares(len(folders), weights)
    refuse_existing(Path(out))
    for folder in folders:
        if (scheme := stored_quantization(folder)) is not None:
            raise MergeError(
                f"{folder} holds {scheme} weights, which cannot be averaged; merge the checkpoints "
                "that they were made from, and quantise the mean"
            )
    config = _common_config(folders)
    first = folders[0]
    dtypes = stored_dtypes(first, config)
    merged_experts = not is_native(first) and uses_merged_experts(list_tensors(first))
    with _on_the_host():
        mean = _weighted_mean(folders, shares, progress)
    save_hf(
        out,
        config,
        traverse_util.unflatten_dict(mean, sep="/"),
        source_config=read_source_config(first),
        dtypes=dtypes,
        merged_experts=merged_experts,
        extra_files=companion_files(first),
        progress=progress,
    )


def best_checkpoints(run: _Path, count: int) -> list[Path]:
    """The checkpoints of a training run with the lowest validation loss, best first.

    They are the folders ``RUN/best/step_*`` with their ``validation.json``, which holds
    ``{"step": …, "loss": …}``. Of equal losses the later step comes first.

    Args:
      run: the run's folder.
      count: how many are wanted.

    Raises:
      MergeError: if there are not as many.
    """
    if count < 1:
        raise MergeError(f"{count} best checkpoints cannot be merged; ask for at least 1")
    best = Path(run) / BEST_FOLDER
    if not best.is_dir():
        raise MergeError(
            f"{best} does not exist; give the folder of a training run that kept its best "
            "checkpoints, or name the checkpoints to merge one by one"
        )
    found = [_validation(file) for file in sorted(best.glob(f"*/{VALIDATION_FILE}"))]
    usable = sorted((loss, -step, folder) for loss, step, folder in found if math.isfinite(loss))
    if len(usable) < count:
        raise MergeError(
            f"{best} holds {len(usable)} checkpoints with a validation loss, not {count}; ask for "
            "fewer"
        )
    return [folder for _, _, folder in usable[:count]]


def _validation(file: Path) -> tuple[float, int, Path]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        loss = math.nan if value["loss"] is None else float(value["loss"])
        return loss, int(value["step"]), file.parent
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise MergeError(
            f"{file} must hold a step and a loss ({type(error).__name__}: {error}); remove that "
            "checkpoint, or write the file again"
        ) from error


def _shares(count: int, weights: Sequence[float] | None) -> list[float]:
    """What each checkpoint is multiplied with before the sum is divided; the largest is 1."""
    if count == 0:
        raise MergeError("there is nothing to merge; name at least one checkpoint")
    if weights is None:
        return [1.0] * count
    if len(weights) != count:
        raise MergeError(f"{len(weights)} weights for {count} checkpoints; give one for each")
    if not all(math.isfinite(w) and w > 0 for w in weights):
        raise MergeError(
            f"weights {', '.join(f'{w:g}' for w in weights)} must be positive; leave out the "
            "checkpoints that are not to count"
        )
    return [w / max(weights) for w in weights]


def _common_config(folders: Sequence[_Path]) -> ModelConfig:
    """The configuration that all share."""
    config = read_config(folders[0])
    for folder in folders[1:]:
        other = read_config(folder)
        for field in dataclasses.fields(ModelConfig):
            a, b = getattr(config, field.name), getattr(other, field.name)
            if a != b:
                raise MergeError(
                    f"{field.name} is {a} in {folders[0]} and {b} in {folder}; only checkpoints "
                    "of one configuration can be averaged"
                )
    return config


def _weighted_mean(
    folders: Sequence[_Path], shares: Sequence[float], progress: bool
) -> dict[str, np.ndarray]:
    """The flat mean in float32."""
    total: dict[str, np.ndarray] = {}
    for folder, share in zip(folders, shares, strict=True):
        flat = _load(folder, progress)
        for path in list(flat):
            array = flat.pop(path)
            first = path not in total
            if first:
                total[path] = np.empty(array.shape, np.float32)
            _accumulate(total[path], array, share, first)
    divisor = np.float32(sum(shares))
    for array in total.values():
        array /= divisor
    return total


def _load(folder: _Path, progress: bool) -> dict[str, Any]:
    try:
        _, params = load_checkpoint(folder, progress=progress)
    except CheckpointError as error:
        raise CheckpointError(f"{folder} cannot be merged: {error}") from error
    return dict(traverse_util.flatten_dict(params, sep="/"))


def _accumulate(total: np.ndarray, array: jax.Array, share: float, first: bool) -> None:
    """``total = share * array``, or ``+=``, in chunks: no second copy of the whole in float32."""
    source = np.asarray(array)  # on a CPU a view
    source, total = source.reshape(len(source), -1), total.reshape(len(source), -1)
    rows = max(1, _CHUNK // source.shape[1])
    for start in range(0, len(source), rows):
        part = slice(start, start + rows)
        scaled = source[part].astype(np.float32) * np.float32(share)
        total[part] = scaled if first else total[part] + scaled


def _on_the_host() -> contextlib.AbstractContextManager[Any]:
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX was told to leave the CPU out
        return contextlib.nullcontext()
