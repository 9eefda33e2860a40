"""Documents into rows of one length, each starting on a block boundary.

block      0       1       2       3       4       5
row     [a a a a|a a e e|b b b e|c c c c|c c c e|. . . .]     e: end token, .: padding
document 1 1 1 1 1 1 1 1 2 2 2 2 3 3 3 3 3 3 3 3 0 0 0 0
position 0 1 2 3 4 5 6 7 0 1 2 3 0 1 2 3 4 5 6 7 0 0 0 0
"""

from __future__ import annotations

from collections.abc import Sequence

import grain
import numpy as np
from jaxtyping import Bool, Int32

Batch = dict[str, np.ndarray]
KEYS = ("tokens", "positions", "document", "supervised")

_BINS = 64  # rows that are filled at a time; more leave less padding and take more memory


def pad_to_blocks(
    tokens: Int32[np.ndarray, " length"],
    supervised: Bool[np.ndarray, " length"],
    *,
    block_length: int,
    eos_token_id: int,
) -> Batch:
    """Fills a document up to a block boundary with supervised end tokens.

    Args:
      tokens, supervised: the document.
      block_length: of which the filled length is a multiple.
      eos_token_id: the filler.

    Returns:
      ``tokens`` and ``supervised`` of the filled document.
    """
    length = len(tokens)
    filled = np.full(length + -length % block_length, eos_token_id, np.int32)
    filled[:length] = tokens
    mask = np.ones(len(filled), bool)
    mask[:length] = supervised
    return {"tokens": filled, "supervised": mask}


def pack_rows(
    documents: grain.IterDataset,
    *,
    max_seq_len: int,
    block_length: int,
    pad_token_id: int,
    packing: bool,
    shuffle_seed: int | None,
) -> grain.IterDataset:
    """Packs documents that ``pad_to_blocks`` has filled, first fit, into rows.

    Args:
      documents: elements with ``tokens`` and ``supervised``.
      max_seq_len: length of a row.
      block_length: every document's length is a multiple of it.
      pad_token_id: fills the end of a row.
      packing: several documents in a row; otherwise one.
      shuffle_seed: shuffles the rows that are filled together; ``None`` keeps their order.

    Returns:
      Rows with ``KEYS``, each ``[L]``.
    """
    if not packing:
        return documents.map(_SingleRow(max_seq_len, pad_token_id))
    lengths = {"tokens": max_seq_len, "supervised": max_seq_len}
    return grain.experimental.FirstFitPackIterDataset(
        documents,
        length_struct=lengths,
        num_packing_bins=_BINS,
        seed=shuffle_seed or 0,
        shuffle_bins=shuffle_seed is not None,
        pack_alignment_struct=dict.fromkeys(lengths, block_length),
        padding_struct={"tokens": pad_token_id, "supervised": False},
    ).map(_from_grain)


def stack_rows(rows: Sequence[Batch]) -> Batch:
    """Rows as one batch, ``[B, L]`` each."""
    return {key: np.stack([row[key] for row in rows]) for key in KEYS}


def empty_row(max_seq_len: int, pad_token_id: int) -> Batch:
    """A row of padding only."""
    return {
        "tokens": np.full(max_seq_len, pad_token_id, np.int32),
        "positions": np.zeros(max_seq_len, np.int32),
        "document": np.zeros(max_seq_len, np.int32),
        "supervised": np.zeros(max_seq_len, bool),
    }


def unpack(batch: Batch) -> list[tuple[np.ndarray, np.ndarray]]:
    """The documents of a batch, row by row: ``(tokens, supervised)``, with their end fill."""
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for tokens, document, supervised in zip(
        batch["tokens"], batch["document"], batch["supervised"], strict=True
    ):
        for number in range(1, int(document.max()) + 1):
            inside = document == number
            found.append((tokens[inside], supervised[inside]))
    return found


def _from_grain(row: Batch) -> Batch:
    """Grain's names to ours; its segment ids and positions are what we call so."""
    return {
        "tokens": row["tokens"],
        "positions": row["tokens_positions"],
        "document": row["tokens_segment_ids"],
        "supervised": row["supervised"],
    }


class _SingleRow:
    """One document a row."""

    def __init__(self, max_seq_len: int, pad_token_id: int):
        self._max_seq_len = max_seq_len
        self._pad_token_id = pad_token_id

    def __call__(self, document: Batch) -> Batch:
        length = len(document["tokens"])
        row = empty_row(self._max_seq_len, self._pad_token_id)
        row["tokens"][:length] = document["tokens"]
        row["positions"][:length] = np.arange(length)
        row["document"][:length] = 1
        row["supervised"][:length] = document["supervised"]
        return row
