"""Batches: documents mixed, shuffled, shared among processes, packed, and resumable.

sources ─ shuffle ─ share ─ repeat ─┐
sources ─ shuffle ─ share ─ repeat ─┴ mix ─ pack ─ batch ─ prefetch
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from llada_jax.config import ConfigError
from llada_jax.data.config import DataConfig, SourceSpec, Split
from llada_jax.data.errors import DataError
from llada_jax.data.fingerprint import digest
from llada_jax.data.ingest import tokenized_files
from llada_jax.data.iterator import BatchIterator
from llada_jax.data.pack import Batch, empty_row, pack_rows, stack_rows
from llada_jax.data.source import FileSource, GeneratedSource, cut_at_random
from llada_jax.data.tokenize import DocumentTokenizer
from llada_jax.text import ChatTemplate, Tokenizer

Source = FileSource | GeneratedSource

_PREFETCHED = 2  # batches made ahead of the training step


def make_batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    *,
    batch_size: int,
    split: Split,
    process_index: int = 0,
    process_count: int = 1,
    seed: int | None = None,
) -> BatchIterator:
    """An iterator of batches.

    A batch has four arrays ``[B, L]``: ``tokens``; ``positions``, from 0 in each document;
    ``document``, 1, 2, … within a row and 0 for padding; ``supervised``, the tokens that noise may
    change and the loss covers.

    Training batches never end: every epoch has another order, and processes read disjoint
    documents. Validation batches come once, in order, equally many on every process; the last one
    is completed with empty rows.

    Args:
      config: the data.
      tokenizer: of the model.
      template: renders conversations; ``None`` if there are only texts.
      batch_size: rows of all processes together.
      split: ``"train"`` or ``"validation"``.
      process_index, process_count: which share of the rows this process makes.
      seed: decides order and generated problems; ``None`` for ``config.shuffle_seed``.

    Returns:
      The iterator; ``get_state()`` gives a JSON value and ``set_state()`` resumes exactly.

    Raises:
      ConfigError: if the rows cannot be shared evenly, or there is no validation data.
      DataError: if the data cannot be used.
    """
    if batch_size < 1 or batch_size % process_count:
        below = batch_size // process_count * process_count
        near = f"{below} or " if below else ""
        raise ConfigError(
            f"batch_size = {batch_size} is not a multiple of the {process_count} processes; use "
            f"{near}{below + process_count}"
        )
    if not 0 <= process_index < process_count:
        raise ConfigError(f"process_index = {process_index} must be from 0 to {process_count - 1}")
    seed = config.shuffle_seed if seed is None else seed
    sources = make_sources(
        config, tokenizer, template, split=split, seed=seed, progress=process_index == 0
    )
    eos = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos
    assert pad is not None
    rows_per_process = batch_size // process_count
    if split == "train":
        documents = _training_documents(config, sources, seed, process_index, process_count)
    else:
        documents = grain.MapDataset.concatenate(
            [_map_dataset(source) for source, _ in sources]
        ).to_iter_dataset(_IN_PLACE)
    rows = pack_rows(
        documents,
        max_seq_len=config.max_seq_len,
        block_length=config.block_length,
        pad_token_id=pad,
        packing=config.packing,
        shuffle_seed=_derived_seed(seed, "rows") if split == "train" else None,
    )
    if split == "train":
        batches = rows.batch(rows_per_process, batch_fn=stack_rows)
    else:
        share = functools.partial(
            _share,
            filler=empty_row(config.max_seq_len, pad),
            start=process_index * rows_per_process,
            stop=(process_index + 1) * rows_per_process,
        )
        batches = rows.batch(batch_size, batch_fn=share)
    if split == "train" and config.num_workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain's workers read absl flags; we have none to parse
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.num_workers))
    else:
        batches = grain.experimental.ThreadPrefetchIterDataset(
            batches, prefetch_buffer_size=_PREFETCHED
        )
    names = ("max_seq_len", "block_length", "packing", "random_length", "num_workers")
    identity = {
        "documents": digest([[source.fingerprint(), weight] for source, weight in sources]),
        **{name: getattr(config, name) for name in names},
        "seed": seed,
        "process": f"{process_index} of {process_count}",
    }
    return BatchIterator(iter(batches), identity)


def make_sources(
    config: DataConfig,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    *,
    split: Split,
    seed: int | None = None,
    progress: bool = True,
) -> list[tuple[Source, float]]:
    """The documents of a split, before they are shuffled and packed, with their weights.

    Args:
      config, tokenizer, template, split, seed: see ``make_batches``.
      progress: show a bar while large files are tokenised.

    Returns:
      Sources and weights. Files without weights make one source together.

    Raises:
      ConfigError: if there is no validation data.
      DataError: if the data cannot be used.
    """
    seed = config.shuffle_seed if seed is None else seed
    tokenize = DocumentTokenizer(tokenizer, template, config.last_turn_only)
    assert tokenizer.eos_token_id is not None
    specs = config.sources(split)
    groups: list[list[SourceSpec]] = [[spec] for spec in specs]
    if all(spec.path is not None and spec.weight is None for spec in specs):
        groups = [list(specs)]
    sources: list[tuple[Source, float]] = []
    for number, group in enumerate(groups):
        weight = group[0].weight if group[0].weight is not None else 1.0
        if group[0].task is not None:
            source = GeneratedSource(
                group[0],
                config,
                split=split,
                tokenize=tokenize,
                seed=_derived_seed(seed, f"problems {number}"),
            )
        else:
            paths = [spec.path for spec in group if spec.path is not None]
            files = [
                file
                for path in paths
                for file in tokenized_files(path, config, tokenize, progress=progress)
            ]
            source = FileSource(
                files,
                config,
                split=split,
                eos_token_id=tokenizer.eos_token_id,
                name=", ".join(paths),
            )
        sources.append((source, weight))
    return sources


_IN_PLACE = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


def _training_documents(
    config: DataConfig,
    sources: list[tuple[Source, float]],
    seed: int,
    process_index: int,
    process_count: int,
) -> grain.IterDataset:
    """An endless mixture of this process's share of the documents."""
    parts: list[grain.MapDataset] = []
    for number, (source, _) in enumerate(sources):
        if len(source) < process_count:
            raise DataError(
                f"{source!r} cannot be shared by {process_count} processes; add documents or use "
                "fewer processes"
            )
        part = _map_dataset(source)
        if isinstance(source, FileSource):  # a task's problems are in random order already
            part = part.shuffle(seed=_derived_seed(seed, f"order {number}"))
            if config.random_length:
                cut = functools.partial(
                    cut_at_random,
                    probability=config.random_length,
                    block_length=config.block_length,
                )
                part = part.random_map(cut, seed=_derived_seed(seed, f"cut {number}"))
        parts.append(part[process_index::process_count].repeat())
    if len(parts) == 1:
        return parts[0].to_iter_dataset(_IN_PLACE)
    mixed = grain.MapDataset.mix(parts, weights=[weight for _, weight in sources])
    return mixed.to_iter_dataset(_IN_PLACE)


def _map_dataset(source: Any) -> grain.MapDataset:
    """Grain leaves out elements that are ``None``, but its types do not know it."""
    return grain.MapDataset.source(source)


def _share(rows: Sequence[Batch], *, filler: Batch, start: int, stop: int) -> Batch:
    """This process's rows of a batch; rows that are missing are empty."""
    return stack_rows([rows[i] if i < len(rows) else filler for i in range(start, stop)])


def _derived_seed(seed: int, purpose: str) -> int:
    """An own 32-bit seed for each purpose, so that neighbouring seeds share nothing."""
    return int(np.random.SeedSequence([seed, *purpose.encode()]).generate_state(1)[0])
