"""The configuration of a training run: YAML in, dotted overrides, resolved YAML out."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from llada_jax.config import ConfigError, config_folder, read_mapping, unknown_field_message
from llada_jax.data import DataConfig
from llada_jax.diffusion import DiffusionConfig, checked_fields

SCHEDULES = ("cosine", "wsd", "constant")
REMAT = ("none", "dots", "full")

# Where a name of dFactory, or another usual spelling, lives here.
_MOVED = {
    ("data", "noise_range_low"): ("diffusion", "noise_range_low"),
    ("data", "noise_range_high"): ("diffusion", "noise_range_high"),
    ("train", "block_size"): ("diffusion", "block_size"),
    ("train", "confidence_beta"): ("diffusion", "confidence_beta"),
    ("train", "learning_rate"): ("train", "lr"),
    ("train", "lr_scheduler"): ("train", "lr_decay_style"),
    ("train", "gradient_checkpointing"): ("train", "remat"),
    ("train", "enable_gradient_checkpointing"): ("train", "remat"),
}
# dFactory's settings that have one value here; another one is an error.
_FIXED = {
    ("train", "same_token_labels"): True,
    ("train", "block_diffusion_mode"): True,
    ("train", "optimizer"): "adamw",
    ("data", "datasets_type"): "mapping",
}


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """Which model to train.

    Attributes:
      model_path: weights to start from: a folder, a hub id, or an orbax folder. Without one,
        weights are drawn.
      config_path: without ``model_path``: a short name (``"nano"``), a YAML file or a folder.
      tokenizer_path: a folder with a tokenizer and a chat template; by default ``model_path``.
      tokenizer_vocab_size: without a tokenizer: train a sentencepiece one of so many pieces, on
        the training data.
    """

    model_path: str | None = None
    config_path: str | None = None
    tokenizer_path: str | None = None
    tokenizer_vocab_size: int | None = None


@dataclasses.dataclass(frozen=True)
class TrainSection:
    """How to train.

    Attributes:
      output_dir: everything of the run goes there; the same command resumes from it.
      max_steps: optimizer steps; or give ``num_train_epochs``.
      num_train_epochs: passes over the data, for data that has an end.
      global_batch_size: rows an optimizer step, all processes together.
      micro_batch_size: rows at a time, all devices together; smaller ones are accumulated.
        ``None``: the whole batch.
      lr, lr_min: learning rate after warm-up, and at the end.
      lr_warmup_ratio: share of the steps with a rising rate.
      lr_decay_style: ``"cosine"``, ``"wsd"`` (constant, then linear over the last
        ``lr_decay_ratio`` of the steps) or ``"constant"``.
      lr_decay_ratio: see above.
      beta1, beta2, eps, weight_decay: of AdamW; norms and biases do not decay.
      max_grad_norm: gradients are scaled down to this norm; 0 for no limit.
      enable_mixed_precision: bfloat16 activations; weights and optimizer stay float32.
      remat: what the backward pass keeps of a layer: ``"none"``, ``"dots"`` or ``"full"``.
      expert_bias_update_rate: step of the auxiliary-loss-free load balancing: 1e-3 for
        pre-training, 0 (off) for fine-tuning.
      train_pad_embedding: whether the padding's embedding learns; in the released code it does
        not.
      seed: of weights and noise (``data.shuffle_seed`` is the data's).
      save_steps: steps between checkpoints; 0: only at the end.
      keep_checkpoints: how many of the newest stay.
      eval_steps: steps between validations; 0: never.
      keep_best: how many of the best by validation loss stay, as Hugging Face folders.
      log_steps: steps between lines of the log.
      save_hf_weights: export to the Hugging Face layout at the end.
      data, fsdp, expert, tensor: devices along each axis of the mesh; ``fsdp=0``: all that are
        left.
      tensorboard: also log there (extra ``tracking``).
      wandb_project: also log there (extra ``tracking``).
      wandb_name: of the run.
    """

    output_dir: str
    max_steps: int | None = None
    num_train_epochs: float | None = None
    global_batch_size: int = 8
    micro_batch_size: int | None = None
    lr: float = 1e-5
    lr_min: float = 1e-7
    lr_warmup_ratio: float = 0.03
    lr_decay_style: str = "cosine"
    lr_decay_ratio: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    enable_mixed_precision: bool = True
    remat: str = "none"
    expert_bias_update_rate: float = 0.0
    train_pad_embedding: bool = False
    seed: int = 0
    save_steps: int = 500
    keep_checkpoints: int = 2
    eval_steps: int = 0
    keep_best: int = 3
    log_steps: int = 10
    save_hf_weights: bool = True
    data: int = 1
    fsdp: int = 0
    expert: int = 1
    tensor: int = 1
    tensorboard: bool = False
    wandb_project: str | None = None
    wandb_name: str | None = None

    def __post_init__(self):
        def require(ok: bool, name: str, wanted: str):
            if not ok:
                raise ConfigError(f"train.{name} = {getattr(self, name)!r} must be {wanted}")

        require(bool(self.output_dir), "output_dir", "the name of a folder")
        if (self.max_steps is None) == (self.num_train_epochs is None):
            raise ConfigError("give either train.max_steps or train.num_train_epochs")
        if self.max_steps is not None:
            require(self.max_steps >= 1, "max_steps", "at least 1")
        if self.num_train_epochs is not None:
            require(self.num_train_epochs > 0, "num_train_epochs", "positive")
        for name in ("global_batch_size", "log_steps", "keep_checkpoints"):
            require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("data", "expert", "tensor"):
            require(getattr(self, name) >= 1, name, "at least 1")
        for name in [
            "save_steps",
            "eval_steps",
            "keep_best",
            "lr_min",
            "weight_decay",
            "max_grad_norm",
            "seed",
            "fsdp",
            "expert_bias_update_rate",
        ]:
            require(getattr(self, name) >= 0, name, "at least 0")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, name, "in [0, 1)")
        require(self.eps > 0, "eps", "positive")
        micro = self.micro_batch_size
        if micro is not None and (micro < 1 or self.global_batch_size % micro):
            raise ConfigError(
                f"train.micro_batch_size = {micro} does not divide train.global_batch_size = "
                f"{self.global_batch_size}"
            )
        require(self.lr > 0, "lr", "positive")
        require(self.lr_min <= self.lr, "lr_min", f"at most train.lr = {self.lr}")
        for name in ("lr_warmup_ratio", "lr_decay_ratio"):
            require(0 <= getattr(self, name) <= 1, name, "between 0 and 1")
        require(self.lr_decay_style in SCHEDULES, "lr_decay_style", f"one of {SCHEDULES}")
        require(self.remat in REMAT, "remat", f"one of {REMAT}")

    @property
    def accumulation(self) -> int:
        """Micro-batches an optimizer step."""
        return self.global_batch_size // (self.micro_batch_size or self.global_batch_size)


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of the training with one objective, compiled once.

    Attributes:
      until: share of all steps at which it ends.
      diffusion: its objective.
    """

    until: float
    diffusion: DiffusionConfig


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A whole run.

    Attributes:
      model, data, train: the sections of the YAML file.
      phases: the objective over time; one phase unless the file has a list ``phases``, whose
        entries override section ``diffusion``: ``{until: 0.2, block_size: 4, rounds: 1}``.
    """

    model: ModelSection
    data: DataConfig
    train: TrainSection
    phases: tuple[Phase, ...]

    @classmethod
    def from_mapping(cls, raw: Mapping[str, Any]) -> RunConfig:
        """Reads what a YAML file holds.

        Raises:
          ConfigError: for an unknown section or field, or a bad value.
        """
        sections = ("model", "data", "diffusion", "phases", "train")
        for name in raw:
            if name not in sections:
                raise ConfigError(unknown_field_message(str(name), sections, "the configuration"))
        tables: dict[str, dict[str, Any]] = {}
        for name in sections:
            section = raw.get(name) or {}
            if name == "phases":
                continue
            if not isinstance(section, Mapping):
                raise ConfigError(f"{name} = {section!r} must be a section of name: value lines")
            tables[name] = {str(key): value for key, value in section.items()}
        for (section, name), (new_section, new_name) in _MOVED.items():
            if name in tables[section]:
                value = tables[section].pop(name)
                if new_name == "remat" and isinstance(value, bool):
                    value = "full" if value else "none"
                if new_name in tables[new_section]:
                    raise ConfigError(
                        f"{section}.{name} and {new_section}.{new_name} say the same; drop one"
                    )
                tables[new_section][new_name] = value
        for (section, name), allowed in _FIXED.items():
            if name in tables[section] and tables[section].pop(name) != allowed:
                raise ConfigError(f"{section}.{name} must be {allowed!r}; leave it out")
        diffusion = tables["diffusion"]
        data = tables["data"]
        phases = _phases(raw.get("phases"), diffusion)
        data.setdefault("block_length", _alignment(phases, data.get("max_seq_len", 2048)))
        if not tables["train"].get("output_dir"):
            raise ConfigError("train.output_dir is missing; name a folder for the run")
        model = ModelSection(**checked_fields(ModelSection, tables["model"], "model"))
        if model.model_path is None and model.config_path is None:
            raise ConfigError("give model.model_path (weights) or model.config_path (a new model)")
        if model.model_path is None and not (model.tokenizer_path or model.tokenizer_vocab_size):
            raise ConfigError(
                "give model.tokenizer_path, or model.tokenizer_vocab_size to train one"
            )
        documents = DataConfig.from_mapping(data)
        return cls(
            model,
            documents,
            TrainSection(**checked_fields(TrainSection, tables["train"], "train")),
            tuple(_aligned(phase, documents) for phase in phases),
        )

    def to_mapping(self) -> dict[str, Any]:
        """The resolved configuration; ``from_mapping`` reads it back to an equal one."""
        first = dataclasses.asdict(self.phases[0].diffusion)
        phases = [
            {"until": phase.until}
            | {k: v for k, v in dataclasses.asdict(phase.diffusion).items() if v != first[k]}
            for phase in self.phases
        ]
        return {
            "model": dataclasses.asdict(self.model),
            "data": dataclasses.asdict(self.data),
            "diffusion": first,
            "phases": phases,
            "train": dataclasses.asdict(self.train),
        }


def load_run_config(source: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file and applies ``section.key=value`` overrides.

    Args:
      source: a file, or the short name of one in ``configs/train`` (``"sft"``).
      overrides: values are YAML: ``train.lr=1e-5``, ``data.train_path=[a.jsonl, b.jsonl]``.

    Raises:
      ConfigError: if the file does not exist or a value cannot be used.
    """
    path = Path(source)
    if not path.is_file():
        path = config_folder() / "train" / f"{source}.yaml"
        if not path.is_file():
            known = sorted(p.stem for p in (config_folder() / "train").glob("*.yaml"))
            raise ConfigError(
                f"no training configuration {str(source)!r}: give a YAML file, or one of "
                f"{', '.join(known)}"
            )
    raw = apply_overrides(read_mapping(path), overrides)
    given = {override.partition("=")[0] for override in overrides}
    for name, other in (("max_steps", "num_train_epochs"), ("num_train_epochs", "max_steps")):
        if f"train.{name}" in given and f"train.{other}" not in given:
            (raw.get("train") or {}).pop(
                other, None
            )  # the file's: an override says how long instead
    return RunConfig.from_mapping(raw)


def apply_overrides(raw: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """``raw`` with each ``a.b=value`` set; ``phases.0.until=0.5`` reaches into lists.

    Raises:
      ConfigError: for something else than ``key=value``, or a key below a plain value.
    """
    import copy

    result: dict[str, Any] = copy.deepcopy(dict(raw))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"{override!r} is not an override; write section.key=value")
        try:
            value = yaml.safe_load(text) if text else None
        except yaml.YAMLError as error:
            raise ConfigError(f"the value of {override!r} is not YAML: {error}") from error
        if isinstance(value, str):
            with contextlib.suppress(ValueError):  # YAML reads 1e-5 as a string
                value = float(value)
        *parents, last = key.split(".")
        node: Any = result
        for name in parents:
            if isinstance(node, list) and name.isdigit() and int(name) < len(node):
                node = node[int(name)]
            elif isinstance(node, dict):
                if node.get(name) is None:
                    node[name] = {}
                node = node[name]
            else:
                raise ConfigError(f"{override!r}: there is no {name!r} to set something in")
        if isinstance(node, list) and last.isdigit() and int(last) < len(node):
            node[int(last)] = value
        elif isinstance(node, dict):
            node[last] = value
        else:
            kind = "list without that entry" if isinstance(node, list) else "plain value"
            raise ConfigError(f"{override!r}: {'.'.join(parents)} holds a {kind}")
    return result


def _phases(raw: Any, diffusion: Mapping[str, Any]) -> tuple[Phase, ...]:
    if raw is None:
        return (Phase(1.0, DiffusionConfig.from_mapping(diffusion)),)
    if not isinstance(raw, list) or not raw:
        raise ConfigError("phases must be a list such as [{until: 0.2, block_size: 4}, {until: 1}]")
    phases: list[Phase] = []
    for i, entry in enumerate(raw):
        if not isinstance(entry, Mapping) or "until" not in entry:
            raise ConfigError(f"phases[{i}] = {entry!r} needs until, the share of steps it ends at")
        until = entry["until"]
        last = phases[-1].until if phases else 0.0
        if not isinstance(until, int | float) or not last < until <= 1:
            raise ConfigError(f"phases[{i}].until = {until!r} must be in ({last}, 1]")
        overrides = {k: v for k, v in entry.items() if k != "until"}
        phases.append(Phase(float(until), DiffusionConfig.from_mapping({**diffusion, **overrides})))
    if phases[-1].until != 1:
        raise ConfigError(f"the last phase ends at {phases[-1].until}; it must end at 1")
    return tuple(phases)


def _aligned(phase: Phase, data: DataConfig) -> Phase:
    """Says whether every document begins at a multiple of this phase's block size in its row."""
    aligned = not data.packing or data.block_length % phase.diffusion.block_size == 0
    diffusion = dataclasses.replace(phase.diffusion, aligned=aligned)
    return dataclasses.replace(phase, diffusion=diffusion)


def _alignment(phases: Sequence[Phase], max_seq_len: Any) -> int:
    """Documents start at multiples of the final block size; blocks count within documents."""
    size = phases[-1].diffusion.block_size
    return min(size, max_seq_len) if isinstance(max_seq_len, int) else size
