"""Writing a folder all or nothing, and the small files that travel with a model."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from llada_jax.checkpoint.errors import CheckpointError

# Everything but weights and config.json: the tokenizer, its chat template, generation defaults,
# and the PyTorch modelling code that config.json's auto_map may point to.
COMPANION_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.jinja",
    "generation_config.json",
    "configuration_*.py",
    "modeling_*.py",
)


def companion_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The files of ``folder`` that a copy of the model should bring along."""
    return sorted({f for pattern in COMPANION_FILES for f in Path(folder).glob(pattern)})


def refuse_existing(folder: Path) -> None:
    """Raises if writing to ``folder`` would overwrite something.

    Raises:
      CheckpointError: if it is a file, or a folder that is not empty.
    """
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists():
        raise CheckpointError(
            f"{folder} exists already and is not an empty folder; choose another name or remove it"
        )


@contextlib.contextmanager
def staged_folder(folder: Path) -> Iterator[Path]:
    """A temporary sibling of ``folder`` that takes its name when the body succeeds.

    Whatever goes wrong, nothing half-written is left behind. With several processes all of them
    enter, and see one temporary folder on their shared file system.

    Raises:
      CheckpointError: if ``folder`` exists and is not empty, or cannot be written.
    """
    folder = folder.absolute()
    first = jax.process_index() == 0
    mark = os.getpid() if jax.process_count() == 1 else "shared"
    temporary = folder.parent / f".{folder.name}.{mark}.partial"
    try:
        refuse_existing(folder)
        if first:
            shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
            temporary.mkdir(parents=True)
        _meet(f"enter {temporary}")
        yield temporary
        _meet(f"leave {temporary}")
        if first:
            if folder.is_dir():
                folder.rmdir()
            temporary.rename(folder)
        _meet(f"renamed {temporary}")
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written: {error}; nothing was left behind"
        ) from error
    finally:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)


def _meet(where: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def write_json(file: Path, value: Any) -> None:
    """Writes JSON as Hugging Face does: two spaces, final newline."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_files(files: Iterable[str | os.PathLike[str]], folder: Path) -> None:
    """Copies files into ``folder``, unless it holds one of that name already."""
    for file in map(Path, files):
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
