"""What a run starts from: model, weights, tokenizer and batches."""

from __future__ import annotations

import dataclasses
import itertools
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from llada_jax.checkpoint import (
    CheckpointError,
    companion_files,
    load_checkpoint,
    read_config,
    read_source_config,
    resolve_model,
    stored_quantization,
)
from llada_jax.checkpoint.staging import staged_folder
from llada_jax.config import ConfigError, ModelConfig
from llada_jax.data import BatchIterator, make_batches, make_sources
from llada_jax.data.texts import training_texts
from llada_jax.model import LLaDA2
from llada_jax.parallel import make_mesh
from llada_jax.text import ChatError, ChatTemplate, Tokenizer, load_tokenizer
from llada_jax.text.train_sentencepiece import train_sentencepiece
from llada_jax.training.checkpoint import saved_steps
from llada_jax.training.config import RunConfig
from llada_jax.training.state import BATCH_AXES, param_shardings


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run works with.

    Attributes:
      model: the network, with the activations' type and the remat policy.
      config: its architecture.
      source_config: the ``config.json`` that it came with; ``None`` for a new model.
      source: the folder of the starting weights; ``None`` for a new model.
      tokenizer, template: of the run.
      tokenizer_files: what an exported model takes along.
      mesh: the devices.
      total_steps: optimizer steps of the whole run.
    """

    model: LLaDA2
    config: ModelConfig
    source_config: dict[str, Any] | None
    source: Path | None
    tokenizer: Tokenizer
    template: ChatTemplate | None
    tokenizer_files: tuple[Path, ...]
    mesh: Mesh
    total_steps: int

    def initial_params(self, seed: int) -> dict[str, Any]:
        """The starting weights: read, or drawn."""
        if self.source is None:
            return self.model.init_params(jax.random.key(seed))
        return load_checkpoint(self.source, config=self.config, mesh=self.mesh, progress=True)[1]


def prepare(run: RunConfig) -> Start:
    """Reads or makes everything that does not change during a run.

    Raises:
      ConfigError, CheckpointError, TokenizerError, DataError: if something cannot be used.
    """
    train = run.train
    source = resolve_model(run.model.model_path) if run.model.model_path else None
    if source is not None:
        if (scheme := stored_quantization(source)) is not None:
            raise CheckpointError(
                f"{source} holds {scheme} weights, which are for inference only; train the "
                "checkpoint that they were made from"
            )
        config = read_config(source)
        source_config = read_source_config(source)
    else:
        assert run.model.config_path is not None
        config, source_config = ModelConfig.from_name(run.model.config_path), None
    folder = _tokenizer_folder(run, source)
    if source is None:
        config = _with_tokenizer(config, folder)
    tokenizer = load_tokenizer(
        folder, mask_token_id=config.mask_token_id, eos_token_ids=config.eos_token_ids
    )
    if tokenizer is None:
        raise ConfigError(f"{folder} has no tokenizer; set model.tokenizer_path to one that has")
    try:
        template = ChatTemplate.from_folder(folder, tokenizer)
    except ChatError:
        template = None  # fine for plain text; conversations will say what they lack
    mesh = _mesh(run, config)
    if run.data.max_seq_len > config.max_position_embeddings:
        raise ConfigError(
            f"data.max_seq_len = {run.data.max_seq_len} exceeds the model's "
            f"max_position_embeddings = {config.max_position_embeddings}; use at most that"
        )
    dtype = jnp.bfloat16 if train.enable_mixed_precision else jnp.float32
    total_steps = train.max_steps or _steps_of_epochs(run, tokenizer, template)
    return Start(
        LLaDA2(config, dtype=dtype, remat=train.remat),
        config,
        source_config,
        source,
        tokenizer,
        template,
        tuple(companion_files(folder)),
        mesh,
        total_steps,
    )


def batches(run: RunConfig, start: Start, split: Any) -> BatchIterator:
    """The run's batches, all rows of all processes: ``place`` takes what a process needs.

    So the position in the data does not depend on the number of processes.
    """
    return make_batches(
        run.data,
        start.tokenizer,
        start.template,
        batch_size=run.train.global_batch_size,
        split=split,
    )


def place(batch: Any, run: RunConfig, sharding: Any) -> dict[str, jax.Array]:
    """Cuts a batch into micro-batches ``[A, B, L]`` and puts each device's rows there."""
    count = run.train.accumulation

    def put(x: np.ndarray) -> jax.Array:
        cut = np.ascontiguousarray(x).reshape(count, -1, *x.shape[1:])
        return jax.make_array_from_callback(cut.shape, sharding, lambda index: cut[index])

    return {name: put(np.asarray(x)) for name, x in batch.items()}


def _tokenizer_folder(run: RunConfig, source: Path | None) -> Path:
    if run.model.tokenizer_path is not None:
        return resolve_model(run.model.tokenizer_path)
    if source is not None:
        return source
    folder = Path(run.train.output_dir) / "tokenizer"
    resumed = saved_steps(folder.parent / "checkpoints") and folder.is_dir()
    if not resumed:  # one from an attempt without a checkpoint may be of other data
        size = run.model.tokenizer_vocab_size
        assert size is not None
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("every process has looked")
        if jax.process_index() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("the old tokenizer is gone")
        with staged_folder(folder) as temporary:
            if jax.process_index() == 0:
                texts = training_texts(run.data)
                first = next(texts, None)
                if first is None:
                    raise ConfigError(
                        "data.train_path holds no documents to train a tokenizer on; give data "
                        "with at least one good row"
                    )
                train_sentencepiece(itertools.chain([first], texts), temporary, size)
    return folder


def _with_tokenizer(config: ModelConfig, folder: Path) -> ModelConfig:
    """A new model takes vocabulary and special tokens from its tokenizer."""
    tokenizer = load_tokenizer(folder)
    if tokenizer is None or tokenizer.mask_token_id is None or tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer in {folder} needs a mask token and an end token")
    eos = [tokenizer.eos_token_id]
    end_of_turn = tokenizer.encode("<|role_end|>")
    if len(end_of_turn) == 1:
        eos.append(end_of_turn[0])
    return dataclasses.replace(
        config,
        vocab_size=max(tokenizer.vocab_size, tokenizer.mask_token_id + 1),
        mask_token_id=tokenizer.mask_token_id,
        eos_token_ids=tuple(dict.fromkeys(eos)),
        pad_token_id=tokenizer.eos_token_id,
    )


def _mesh(run: RunConfig, config: ModelConfig) -> Mesh:
    t = run.train
    fixed = t.data * t.expert * t.tensor
    fsdp = t.fsdp or max(jax.device_count() // fixed, 1)
    rows = run.train.global_batch_size // t.accumulation
    shares = t.data * fsdp
    if rows % shares:
        raise ConfigError(
            f"{rows} rows at a time cannot be spread over {shares} devices "
            f"({' x '.join(BATCH_AXES)} of the mesh); make train.micro_batch_size (or "
            f"global_batch_size) a multiple of {shares}, or set train.fsdp"
        )
    try:
        mesh = make_mesh(data=t.data, fsdp=fsdp, expert=t.expert, tensor=t.tensor)
        param_shardings(config, mesh)
    except ValueError as error:
        raise ConfigError(f"train.data, fsdp, expert and tensor do not fit: {error}") from error
    return mesh


def _steps_of_epochs(run: RunConfig, tokenizer: Tokenizer, template: ChatTemplate | None) -> int:
    """Rows are taken as full: packing leaves a few percent of them empty."""
    epochs = run.train.num_train_epochs
    assert epochs is not None
    if any(spec.task is not None for spec in run.data.sources("train")):
        raise ConfigError("generated tasks never end: give train.max_steps, not num_train_epochs")
    lengths = _padded_lengths(run, tokenizer, template)
    rows = len(lengths) if not run.data.packing else sum(lengths) / run.data.max_seq_len
    return max(1, math.ceil(epochs * rows / run.train.global_batch_size))


def _padded_lengths(run: RunConfig, tokenizer: Tokenizer, template: Any) -> list[int]:
    def lengths() -> Iterator[int]:
        for source, _ in make_sources(run.data, tokenizer, template, split="train"):
            for i in range(len(source)):
                element = source[i]
                yield 0 if element is None else len(element["tokens"])

    return list(lengths())
