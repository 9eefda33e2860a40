"""Tokenises files, once."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

from llada_jax.data.cache import TokenFile, TokenWriter, cache_folder, is_complete
from llada_jax.data.config import DataConfig
from llada_jax.data.errors import DataError, warn
from llada_jax.data.files import find_files, kind_of, read_rows
from llada_jax.data.fingerprint import (
    digest,
    file_fingerprint,
    template_fingerprint,
    tokenizer_fingerprint,
)
from llada_jax.data.records import RecordError, as_record
from llada_jax.data.tokenize import DocumentTokenizer

_VERSION = 1  # of the cache's format and of what documents are made of
_QUIET = 4 << 20  # bytes; smaller files are done before a bar is of use


def tokenized_files(
    path: str | Path, config: DataConfig, tokenize: DocumentTokenizer, *, progress: bool = True
) -> list[TokenFile]:
    """The tokenised files of a path, from the cache where they are there.

    Args:
      path: a file, a folder or a pattern.
      config: how to read it.
      tokenize: turns records into documents.
      progress: show a bar for large files.

    Raises:
      DataError: if there is no data, a file cannot be read, or a row is bad and
        ``config.on_bad_row`` is ``"error"``.
    """
    folder = cache_folder(config.cache_dir)
    rules = digest(
        _VERSION,
        tokenizer_fingerprint(tokenize.tokenizer),
        template_fingerprint(tokenize.template),
        tokenize.last_turn_only,
        config.text_keys,
        config.document_separator,
    )
    files: list[TokenFile] = []
    for file in find_files(path):
        name = digest(rules, kind_of(file), file.suffix == ".gz", _fingerprint(file))
        entry = TokenFile(folder / name, file)
        if not is_complete(entry.folder):
            _write(entry, config, tokenize, progress)
        bad = entry.meta["bad_rows"]
        if bad and config.on_bad_row == "error":
            raise DataError(f"{file}, {entry.meta['bad'][0]}")
        if bad:
            total = bad + len(entry)
            shown = "; ".join(entry.meta["bad"])
            more = "; …" if bad > len(entry.meta["bad"]) else ""
            warn(f"{file}: {bad} of {total} rows are bad and left out: {shown}{more}")
        files.append(entry)
    return files


def _fingerprint(file: Path) -> str:
    try:
        return file_fingerprint(file)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def _write(
    entry: TokenFile, config: DataConfig, tokenize: DocumentTokenizer, progress: bool
) -> None:
    """Makes a cache entry."""
    try:
        writer = TokenWriter(entry.folder)
        try:
            _fill(writer, entry.file, config, tokenize, progress)
            writer.finish()
        except BaseException:
            writer.abandon()
            raise
    except OSError as error:  # the file's own are DataErrors by now
        raise DataError(
            f"tokens cannot be written to {entry.folder.parent}: {error}; make room there, or set "
            "data.cache_dir to another folder"
        ) from error


def _fill(
    writer: TokenWriter, file: Path, config: DataConfig, tokenize: DocumentTokenizer, progress: bool
) -> None:
    with _bar(file, progress) as report:
        rows = read_rows(file, document_separator=config.document_separator, progress=report)
        for row in rows:
            try:
                if row.error is not None:
                    raise RecordError(row.error)
                document = tokenize(as_record(row.value, config.text_keys))
            except RecordError as error:
                message = f"{row.place}: {error}"
                if config.on_bad_row == "error":
                    raise DataError(f"{file}, {message}") from error
                writer.add_bad(message)
            else:
                writer.add(document, row.number, row.place)


@contextlib.contextmanager
def _bar(file: Path, progress: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr; the body tells it the position in the file."""
    size = file.stat().st_size
    if not progress or size < _QUIET:
        yield lambda position: None
        return
    from rich import console
    from rich import progress as rich_progress

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.DownloadColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=console.Console(stderr=True)) as bar:
        task = bar.add_task(f"tokenising {file.name}", total=size)
        calls = itertools.count()

        def report(position: int) -> None:
            if next(calls) % 64 == 0 or position == size:
                bar.update(task, completed=position)

        yield report
