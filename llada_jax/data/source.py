"""Random access to documents that fit into a row: of tokenised files, or of a generated task."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Int32, Int64

from llada_jax.data.cache import TokenFile
from llada_jax.data.config import DataConfig, SourceSpec, Split
from llada_jax.data.errors import DataError, warn
from llada_jax.data.pack import Batch, pad_to_blocks
from llada_jax.data.records import RecordError, as_record
from llada_jax.data.tokenize import Document, DocumentTokenizer
from llada_jax.tasks import TaskError, TaskSource

_PROBED = 32  # problems of a task that are tokenised to see whether they fit


class FileSource:
    """The documents of files in order, conversations whole and texts in pieces.

    Elements have ``tokens`` and ``supervised``, filled up to a block boundary, and ``is_text``.

        text      ├──── max_seq_len ────┼──── max_seq_len ────┼─ rest, end ─┤

    Args:
      files: tokenised files.
      config: lengths, what to do with long conversations, the share held out.
      split: which share, if ``config.validation_fraction`` is set.
      eos_token_id: fills documents up.
      name: of the files, for messages.

    Raises:
      DataError: if no document is left, or a conversation is too long and ``config.on_long`` is
        ``"error"``.
    """

    def __init__(
        self,
        files: Sequence[TokenFile],
        config: DataConfig,
        *,
        split: Split,
        eos_token_id: int,
        name: str,
    ):
        self._files = list(files)
        self._block_length = config.block_length
        self._eos_token_id = eos_token_id
        self._name = name
        held_out = [_side(file, config.validation_fraction, split) for file in self._files]
        total, chosen = sum(map(len, self._files)), sum(map(len, held_out))
        if not total:
            bad = sum(file.meta["bad_rows"] for file in self._files)
            why = f"; all {bad} rows are bad" if bad else ""
            raise DataError(f"{name} holds no documents{why}; give data with at least one good row")
        if not chosen:
            raise DataError(
                f"validation_fraction = {config.validation_fraction} of the {total} documents in "
                f"{name} leaves none for {split}; change it, or give a validation_path"
            )
        pieces = [
            _pieces(file, documents, config)
            for file, documents in zip(self._files, held_out, strict=True)
        ]
        long = sum(skipped for _, skipped in pieces)
        if long == chosen:
            raise DataError(
                f"all {chosen} documents in {name} are longer than max_seq_len = "
                f"{config.max_seq_len} tokens; raise max_seq_len or set on_long: truncate"
            )
        if long:
            warn(
                f"{name}: {long} of {chosen} documents are longer than max_seq_len = "
                f"{config.max_seq_len} tokens and left out"
            )
        self._pieces = [found for found, _ in pieces]
        self._ends = np.cumsum([len(found) for found in self._pieces])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        at = int(index)
        if not 0 <= at < len(self):
            raise IndexError(f"index {at} is outside {len(self)} documents")
        document = self.document(at)
        return _element(document, self._block_length, self._eos_token_id)

    def __repr__(self) -> str:
        return f"FileSource({self._name}, {len(self)} documents)"

    def document(self, index: int) -> Document:
        """A document or piece as it was tokenised, without the fill."""
        which = int(np.searchsorted(self._ends, index, side="right"))
        row = index - (int(self._ends[which - 1]) if which else 0)
        number, start, stop = (int(value) for value in self._pieces[which][row])
        return self._files[which].read(number, start, stop)

    def fingerprint(self) -> list[Any]:
        """What tells these documents from others: a JSON value."""
        return [
            [file.folder.name, len(p)] for file, p in zip(self._files, self._pieces, strict=True)
        ]


class GeneratedSource:
    """A generated task's problems, tokenised when asked for; ``None`` where one is too long.

    Args:
      spec: the task.
      config: lengths, what to do with long conversations.
      split: training problems and validation problems never meet.
      tokenize: turns records into documents.
      seed: another seed gives other problems.

    Raises:
      DataError: if there is no such task, or its problems do not fit into a row.
    """

    def __init__(
        self,
        spec: SourceSpec,
        config: DataConfig,
        *,
        split: Split,
        tokenize: DocumentTokenizer,
        seed: int,
    ):
        assert spec.task is not None
        self._spec = spec
        self._config = config
        self._tokenize = tokenize
        self._seed = seed
        self._split: Split = split
        eos = tokenize.tokenizer.eos_token_id
        assert eos is not None
        self._eos_token_id = eos
        try:
            self._problems = TaskSource(
                [spec.task],
                difficulties=None if spec.difficulty is None else {spec.task: spec.difficulty},
                seed=seed,
                split="train" if split == "train" else "test",
                size=spec.problems(split),
            )
        except TaskError as error:
            raise DataError(str(error)) from error
        probed = range(min(len(self), _PROBED))
        if all(self[index] is None for index in probed):
            raise DataError(
                f"problems of task {spec.task!r} are longer than max_seq_len = "
                f"{config.max_seq_len} tokens; raise max_seq_len or lower the difficulty"
            )

    def __len__(self) -> int:
        return len(self._problems)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any] | None:
        try:
            document = self._tokenize(as_record(self._problems[index]))
        except (RecordError, TaskError) as error:
            raise DataError(f"task {self._spec.task!r}, problem {int(index)}: {error}") from error
        limit = self._config.max_seq_len
        if len(document.tokens) > limit:
            if self._config.on_long == "error":
                raise DataError(
                    f"task {self._spec.task!r}, problem {int(index)} has {len(document.tokens)} "
                    f"tokens, more than max_seq_len = {limit}; raise max_seq_len or set "
                    "on_long: skip"
                )
            if self._config.on_long == "skip" or document.spans[0][0] >= limit:
                return None
            spans = tuple((a, min(b, limit)) for a, b in document.spans if a < limit)
            document = dataclasses.replace(document, tokens=document.tokens[:limit], spans=spans)
        return _element(document, self._config.block_length, self._eos_token_id)

    def __repr__(self) -> str:
        return f"GeneratedSource({self._problems!r})"

    def fingerprint(self) -> list[Any]:
        """What tells these documents from others: a JSON value."""
        return [repr(self._problems), len(self)]


def cut_at_random(
    element: dict[str, Any], rng: np.random.Generator, *, probability: float, block_length: int
) -> dict[str, Any]:
    """Cuts a piece of plain text at a random block boundary, now and then.

    Args:
      element: of a ``FileSource``.
      rng: where randomness comes from.
      probability: of a cut.
      block_length: the cut piece has one block or more.

    Returns:
      The element, or its beginning.
    """
    blocks = len(element["tokens"]) // block_length
    if not element["is_text"] or blocks < 2 or rng.random() >= probability:
        return element
    length = int(rng.integers(1, blocks)) * block_length
    cut = {key: element[key][:length] for key in ("tokens", "supervised")}
    return {**element, **cut}


def _element(document: Document, block_length: int, eos_token_id: int) -> dict[str, Any]:
    filled: Batch = pad_to_blocks(
        document.tokens,
        document.supervised,
        block_length=block_length,
        eos_token_id=eos_token_id,
    )
    return {**filled, "is_text": document.is_text}


def _side(file: TokenFile, fraction: float, split: Split) -> Int64[np.ndarray, " chosen"]:
    """The documents of a split: hashes are even in [0, 2^64)."""
    if not fraction:
        return np.arange(len(file))
    held_out = file.hashes < np.uint64(int(fraction * 2.0**64))
    return np.flatnonzero(held_out if split == "validation" else ~held_out)


def _pieces(
    file: TokenFile, documents: Int64[np.ndarray, " chosen"], config: DataConfig
) -> tuple[Int32[np.ndarray, "pieces 3"], int]:
    """Rows of ``document, start, stop``, and how many conversations are left out as too long."""
    limit = config.max_seq_len
    lengths = np.diff(file.offsets)[documents]
    is_text = file.is_text[documents]
    long = (lengths > limit) & ~is_text
    if config.on_long == "error" and long.any():
        first = int(np.argmax(long))
        raise DataError(
            f"{file.file}, {file.meta['unit']} {int(file.numbers[documents[first]])}: the "
            f"conversation has {int(lengths[first])} tokens, more than max_seq_len = {limit}; "
            "raise max_seq_len, or set on_long to skip or truncate"
        )
    if config.on_long == "truncate" and len(documents):
        first_span = file.spans[file.span_offsets[documents], 0]
        lengths = np.where(long & (first_span < limit), limit, lengths)
        long &= first_span >= limit  # nothing to learn would be left
    counts = np.where(is_text, -(-lengths // limit), 1)
    counts -= is_text & (lengths > limit) & (lengths % limit == 1)  # a piece of the end token only
    counts[long] = 0
    rows = np.repeat(np.arange(len(documents)), counts)
    piece = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = piece * limit
    stop = np.minimum(start + limit, lengths[rows])
    return np.stack([documents[rows], start, stop], axis=1).astype(np.int32), int(long.sum())
