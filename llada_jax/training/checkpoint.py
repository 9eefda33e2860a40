"""Checkpoints of a run: everything that its next step depends on, or nothing.

RUN/
  config.yaml           the resolved configuration
  metrics.jsonl         the log
  tokenizer/            tokenizer and chat template
  checkpoints/step_00000100/
    state/              orbax: step, weights, optimizer, key
    run.json            position in the data, metrics not logged yet
  best/step_00000100/   Hugging Face layout, validation.json
  hf/                   the final weights, Hugging Face layout
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from llada_jax.checkpoint import CheckpointError
from llada_jax.checkpoint.staging import copy_files, staged_folder, write_json
from llada_jax.training.state import TrainState

_STATE, _RUN = "state", "run.json"
_STEP = re.compile(r"step_(\d+)$")


class ResumeError(ValueError):
    """A run that cannot go on from its checkpoint."""


def step_folder(parent: Path, step: int) -> Path:
    """``parent/step_00000100``."""
    return parent / f"step_{step:08d}"


def saved_steps(parent: Path) -> list[int]:
    """Steps that ``parent`` has a folder of, in order."""
    if not parent.is_dir():
        return []
    found = (_STEP.match(path.name) for path in parent.iterdir())
    return sorted(int(match.group(1)) for match in found if match)


def save_checkpoint(
    run: Path, state: TrainState, position: Any, keep: int, window: Sequence[Any] = ()
) -> None:
    """Writes a checkpoint, then removes all but the newest ``keep``.

    Args:
      run: the run's folder.
      state: the state after some step.
      position: where the data stands, a JSON value.
      keep: how many to keep.
      window: metrics of the steps that the log has no line of yet, JSON values.

    Raises:
      CheckpointError: if it cannot be written; older checkpoints are untouched then.
    """
    parent, step = run / "checkpoints", int(state.step)
    folder = step_folder(parent, step)
    if folder.exists():
        return
    if jax.process_index() == 0:
        for left in parent.glob(".step_*.partial"):  # of a run that was killed
            shutil.rmtree(left, ignore_errors=True)
    with staged_folder(folder) as temporary:
        try:
            ocp.save(str(temporary / _STATE), _named_leaves(state))
        except Exception as error:  # orbax and tensorstore raise many types
            first = str(error).splitlines()[0] if str(error) else "no message"
            raise CheckpointError(
                f"{folder} cannot be written ({type(error).__name__}: {first}); make room. Older "
                "checkpoints are as they were"
            ) from error
        if jax.process_index() == 0:
            saved = {"step": step, "data": position, "window": list(window)}
            write_json(temporary / _RUN, saved)
            if (run / "config.yaml").is_file():
                copy_files([run / "config.yaml"], temporary)
    if jax.process_index() == 0:
        for old in saved_steps(parent)[:-keep]:
            shutil.rmtree(step_folder(parent, old), ignore_errors=True)


def load_checkpoint_state(
    run: Path, abstract: TrainState, step: int | None = None
) -> tuple[TrainState, dict[str, Any]] | None:
    """The newest checkpoint (or that of ``step``), on any mesh and number of processes.

    Args:
      run: the run's folder.
      abstract: shapes, dtypes and shardings to restore to.
      step: which one.

    Returns:
      The state, and what was saved with it: ``data`` is the data's position, ``window`` the
      metrics not logged yet. ``None`` if there is no checkpoint.

    Raises:
      ResumeError: if it belongs to another model or optimizer, or is damaged.
    """
    steps = saved_steps(run / "checkpoints")
    if not steps:
        return None
    folder = step_folder(run / "checkpoints", steps[-1] if step is None else step).absolute()
    try:
        stored = ocp.metadata(str(folder / _STATE)).metadata
        wanted = _named_leaves(abstract)
        for name in sorted(stored.keys() ^ wanted.keys()):
            raise ResumeError(
                f"{folder} does not hold a state of this run ({name}); use another "
                "train.output_dir, or the configuration that the run began with"
            )
        for name, leaf in wanted.items():
            if tuple(stored[name].shape) != tuple(leaf.shape):
                raise ResumeError(
                    f"{name} in {folder} has shape {tuple(stored[name].shape)}, this run's has "
                    f"{tuple(leaf.shape)}; use another train.output_dir"
                )
        leaves = ocp.load(str(folder / _STATE), wanted)
        saved = json.loads((folder / _RUN).read_text())
        saved = {"data": saved["data"], "window": saved.get("window", [])}
    except ResumeError:
        raise
    except Exception as error:  # orbax and tensorstore raise many types for a damaged folder
        first = str(error).splitlines()[0] if str(error) else "no message"
        raise ResumeError(
            f"{folder} cannot be restored ({type(error).__name__}: {first}); remove it to resume "
            "from the checkpoint before"
        ) from error
    state = jax.tree.unflatten(jax.tree.structure(abstract), [leaves[name] for name in wanted])
    return state, saved


def _named_leaves(state: TrainState) -> dict[str, Any]:
    """Leaves by path, in the tree's order."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
