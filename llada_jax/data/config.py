"""What to train on: files and generated tasks, how they are cut, packed and shuffled."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from llada_jax.config import ConfigError, unknown_field_message

Split = Literal["train", "validation"]

_CHOICES = {"on_bad_row": ("error", "skip"), "on_long": ("skip", "error", "truncate")}
_VALIDATION_PROBLEMS = 256  # of a generated task, unless its size is given
_TRAINING_PROBLEMS = 2**31  # in effect endless: no problem comes twice


@dataclasses.dataclass(frozen=True)
class SourceSpec:
    """Where documents come from: files, or a generated task.

    Attributes:
      path: a file, a folder or a glob pattern.
      task: name of a task of ``llada_jax.tasks``.
      weight: share of the documents in a mixture; ``None`` leaves it to the number of documents.
      difficulty: of the task: one, or several to draw from.
      size: how many problems the task has.
    """

    path: str | None = None
    task: str | None = None
    weight: float | None = None
    difficulty: int | tuple[int, ...] | None = None
    size: int | None = None

    @classmethod
    def from_raw(cls, raw: Any, where: str) -> SourceSpec:
        """Reads a path, or a mapping with the fields of this class.

        Args:
          raw: what the configuration holds.
          where: the field's name, for messages.

        Raises:
          ConfigError: for an unknown field or a value of the wrong kind.
        """
        if isinstance(raw, str | Path):
            return cls(path=str(raw))
        if not isinstance(raw, Mapping):
            raise ConfigError(
                f"{where} = {raw!r} must be a path, or {{path: …}} or {{task: …}} with a weight"
            )
        known = [field.name for field in dataclasses.fields(cls)]
        for key in raw:
            if key not in known:
                raise ConfigError(unknown_field_message(str(key), known, where))
        values = dict(raw)
        if (values.get("path") is None) == (values.get("task") is None):
            raise ConfigError(f"{where} needs either path or task")
        for key in ("path", "task"):
            if isinstance(values.get(key), Path):
                values[key] = str(values[key])
            if values.get(key) is not None and not isinstance(values[key], str):
                raise ConfigError(f"{where}.{key} = {values[key]!r} must be a string")
        weight = values.get("weight")
        if weight is not None:
            if isinstance(weight, bool) or not isinstance(weight, int | float) or weight <= 0:
                raise ConfigError(
                    f"{where}.weight = {weight!r} must be a positive number; "
                    "leave a source out to skip it"
                )
            values["weight"] = float(weight)
        if values.get("path") is not None:
            for key in ("difficulty", "size"):
                if values.get(key) is not None:
                    raise ConfigError(f"{where}.{key} is for tasks; a path has none")
        difficulty = values.get("difficulty")
        if isinstance(difficulty, Sequence) and not isinstance(difficulty, str):
            values["difficulty"] = difficulty = tuple(difficulty)
        levels = difficulty if isinstance(difficulty, tuple) else (difficulty,)
        if difficulty is not None and not (levels and all(_is_int(level) for level in levels)):
            raise ConfigError(f"{where}.difficulty = {difficulty!r} must be an integer or several")
        size = values.get("size")
        if size is not None and (not _is_int(size) or size < 1):
            raise ConfigError(f"{where}.size = {size!r} must be a positive integer")
        return cls(**values)

    def problems(self, split: Split) -> int:
        """How many problems the task has in a split."""
        if self.size is not None:
            return self.size
        return _TRAINING_PROBLEMS if split == "train" else _VALIDATION_PROBLEMS


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Training and validation data.

    Attributes:
      train_path: a path; or a list of paths and of ``{path: …, weight: …}`` or
        ``{task: …, difficulty: …, weight: …}``. A path is a file, a folder or a glob pattern.
        Without weights, every document comes once an epoch. With one, documents are drawn in
        proportion to the weights (1 where none is given).
      validation_path: the same, read once and in order.
      validation_fraction: instead of ``validation_path``, the share of ``train_path``'s documents
        to hold out. A document's prompt decides, so equal prompts stay on one side.
      text_keys: the key that holds a row's messages or text; found by itself if not given.
      document_separator: what separates the documents of a plain-text file; if not given, a file
        is one document.
      max_seq_len: tokens in a row of a batch; a multiple of ``block_length``.
      block_length: every document starts and ends at a multiple of it.
      packing: several documents in a row; otherwise one.
      last_turn_only: learn the last assistant turn of a conversation only, not the earlier ones.
        (Of those, the block that an answer ends in may also hold the beginning of the next
        question, which is then visible while the answer's end is learned.)
      on_bad_row: ``"error"``, or ``"skip"`` with a warning.
      on_long: conversations longer than ``max_seq_len``: ``"skip"``, ``"error"`` or
        ``"truncate"``. Plain text is always cut into pieces.
      random_length: probability that a piece of plain text is cut at a random block boundary.
      shuffle_seed: decides the order of the training documents.
      cache_dir: where tokenised files are kept; if not given, the user's cache folder.
      num_workers: processes that prepare training batches; 0 for a thread.

    Raises:
      ConfigError: on values that cannot be used.
    """

    train_path: Any
    validation_path: Any = None
    validation_fraction: float = 0.0
    text_keys: str | None = None
    document_separator: str | None = None
    max_seq_len: int = 2048
    block_length: int = 32
    packing: bool = True
    last_turn_only: bool = True
    on_bad_row: str = "error"
    on_long: str = "skip"
    random_length: float = 0.0
    shuffle_seed: int = 0
    cache_dir: str | None = None
    num_workers: int = 0

    def __post_init__(self):
        if self.document_separator == "":
            raise ConfigError("document_separator must not be empty; leave it out")
        least = {"block_length": 1, "max_seq_len": 1, "num_workers": 0, "shuffle_seed": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ConfigError(f"{name} = {getattr(self, name)} must be at least {bound}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"{name} = {getattr(self, name)!r} must be one of {', '.join(choices)}"
                )
        for name in ("validation_fraction", "random_length"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} = {getattr(self, name)} must be a number from 0 to 1")
        if self.validation_fraction == 1:
            raise ConfigError("validation_fraction = 1 leaves nothing to train on")
        if self.validation_fraction and self.validation_path is not None:
            raise ConfigError("validation_path and validation_fraction exclude each other")
        if self.max_seq_len % self.block_length:
            below = self.max_seq_len // self.block_length * self.block_length
            near = f"{below} or " if below else ""
            raise ConfigError(
                f"max_seq_len = {self.max_seq_len} is not a multiple of block_length = "
                f"{self.block_length}; use {near}{below + self.block_length}"
            )
        self.sources("train")
        if self.validation_path is not None:
            self.sources("validation")

    @classmethod
    def from_mapping(cls, raw: Mapping[str, Any]) -> DataConfig:
        """Builds the configuration from a parsed YAML mapping.

        Raises:
          ConfigError: for an unknown field (the message names the nearest), no ``train_path``, or
            a value that cannot be used.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in raw:
            if key not in known:
                raise ConfigError(unknown_field_message(str(key), known, "data"))
        if raw.get("train_path") is None:
            raise ConfigError("data.train_path is missing; give a file, a folder or a task")
        values = dict(raw)
        for field in dataclasses.fields(cls):
            if field.name in values:
                values[field.name] = _of_type(values[field.name], field)
        return cls(**values)

    def sources(self, split: Split) -> tuple[SourceSpec, ...]:
        """The sources of a split.

        Raises:
          ConfigError: if one is malformed, or there is no validation data.
        """
        if split == "train" or (self.validation_path is None and self.validation_fraction):
            name, raw = "train_path", self.train_path
        elif self.validation_path is not None:
            name, raw = "validation_path", self.validation_path
        else:
            raise ConfigError(
                "there is no validation data; set data.validation_path, or "
                "data.validation_fraction to hold out a part of data.train_path"
            )
        listed = list(raw) if isinstance(raw, list | tuple) else [raw]
        if not listed:
            raise ConfigError(f"{name} is empty; give a file, a folder or a task")
        if len(listed) == 1:
            return (SourceSpec.from_raw(listed[0], name),)
        return tuple(SourceSpec.from_raw(entry, f"{name}[{i}]") for i, entry in enumerate(listed))


def _of_type(value: Any, field: dataclasses.Field[Any]) -> Any:
    """Checks a value from YAML against a field's type; an integer is a float, too."""
    kind, _, optional = str(field.type).partition(" | ")
    kinds = {"int": int, "float": (int, float), "bool": bool, "str": str}
    if kind not in kinds or (optional and value is None):
        return value
    if not isinstance(value, kinds[kind]) or isinstance(value, bool) != (kind == "bool"):
        names = {"int": "an integer", "float": "a number", "bool": "true or false"}
        raise ConfigError(f"{field.name} = {value!r} must be {names.get(kind, 'a string')}")
    return float(value) if kind == "float" else value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
