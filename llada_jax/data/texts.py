"""Plain text of the training documents, to train a tokenizer on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from llada_jax.data.config import DataConfig, SourceSpec
from llada_jax.data.files import find_files, read_rows
from llada_jax.data.records import Conversation, RecordError, as_record
from llada_jax.tasks import TaskSource


def training_texts(config: DataConfig, limit: int = 20_000) -> Iterator[str]:
    """The first documents of every training source in turn, without chat markup.

    Args:
      config: the data. Rows that are no records are left out; training will report them.
      limit: how many documents at most.

    Raises:
      DataError: if a file does not exist.
    """
    sources = [_texts(spec, config) for spec in config.sources("train")]
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*sources))
    yield from itertools.islice((text for text in in_turn if text is not None), limit)


def _texts(spec: SourceSpec, config: DataConfig) -> Iterator[str]:
    if spec.task is not None:
        levels = None if spec.difficulty is None else {spec.task: spec.difficulty}
        problems = TaskSource([spec.task], difficulties=levels, seed=config.shuffle_seed)
        for i in range(len(problems)):
            yield _joined(problems[i], None)
        return
    assert spec.path is not None
    for file in find_files(spec.path):
        for row in read_rows(file, document_separator=config.document_separator):
            if row.error is None:
                try:
                    yield _joined(row.value, config.text_keys)
                except RecordError:
                    continue


def _joined(row: object, text_keys: str | None) -> str:
    record = as_record(row, text_keys)
    if isinstance(record, Conversation):
        return "\n".join(str(message.get("content") or "") for message in record.messages)
    return record.text
