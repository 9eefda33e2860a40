"""Files with rows: JSON lines, JSON, Parquet and plain text, gzipped or not."""

from __future__ import annotations

import glob
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llada_jax.data.errors import DataError

_LINES = (".jsonl", ".ndjson", ".json")
_TEXT = (".txt", ".text", ".md")
_PARQUET = (".parquet", ".pq")
_FORMATS = ".jsonl, .json, .parquet, .txt, and .gz of them"


class Row(NamedTuple):
    """One record of a file.

    Attributes:
      place: where it stands, such as ``"line 3"``.
      number: the same as a number, from 1.
      value: the parsed record; a string for a plain-text document.
      error: why it could not be parsed; ``None`` if it could.
    """

    place: str
    number: int
    value: Any
    error: str | None = None


def find_files(path: str | Path) -> list[Path]:
    """The data files that a path means: the file, a folder's files, or those of a pattern.

    Raises:
      DataError: if there is none, or the format is not known.
    """
    name = Path(path).expanduser()
    if name.is_dir():
        found = sorted(file for file in name.iterdir() if file.is_file() and kind_of(file))
        if not found:
            raise DataError(f"folder {path} holds no data; give one with files like {_FORMATS}")
        return found
    if name.exists():
        found = [name]
    else:
        found = sorted(file for file in map(Path, glob.glob(str(name), recursive=True)))
        found = [file for file in found if file.is_file()]
        if not found:
            raise DataError(f"there is no data at {path}; give a file, a folder or a pattern")
    for file in found:
        if kind_of(file) is None:
            raise DataError(f"{file} has no format that is known; use {_FORMATS}")
    return found


def kind_of(file: Path) -> str | None:
    """The format by the file's name: ``"lines"``, ``"text"``, ``"parquet"``, ``None`` if unknown.

    Hidden files have none.
    """
    if file.name.startswith("."):
        return None
    name = file.name.lower()
    packed = name.endswith(".gz")
    name = name.removesuffix(".gz")
    for kind, endings in (("lines", _LINES), ("text", _TEXT), ("parquet", _PARQUET)):
        if name.endswith(endings) and not (packed and kind == "parquet"):
            return kind
    return None


def read_rows(
    file: Path,
    *,
    document_separator: str | None = None,
    progress: Callable[[int], None] = lambda position: None,
) -> Iterator[Row]:
    """Reads a file's records in order.

    Args:
      file: one that ``find_files`` returns.
      document_separator: splits plain text into documents.
      progress: is told the position in the file, in bytes, now and then.

    Raises:
      DataError: if the file cannot be read. A broken record is a row with an error instead.
    """
    try:
        if kind_of(file) == "parquet":
            yield from _parquet_rows(file, progress)
            return
        with file.open("rb") as raw:
            packed = file.name.lower().endswith(".gz")
            stream = gzip.GzipFile(fileobj=raw) if packed else raw
            if kind_of(file) == "text":
                yield from _text_rows(stream, document_separator)
            else:
                for row in _json_rows(stream):
                    progress(raw.tell())
                    yield row
            progress(raw.tell())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} cannot be read: {error}; is it complete?") from error


def _json_rows(stream: io.BufferedIOBase) -> Iterator[Row]:
    """One record a line; or, if the file starts with ``[``, one list of records."""
    for number, line in enumerate(stream, 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
            if line.lstrip().startswith(b"["):
                yield from _listed_rows(line + stream.read())
                return
        if line.strip():
            yield Row(f"line {number}", number, *_parse(line))


def _listed_rows(data: bytes) -> Iterator[Row]:
    values, error = _parse(data)
    if error is not None:
        yield Row("line 1", 1, None, error)
        return
    for number, value in enumerate(values, 1):
        yield Row(f"item {number}", number, value)


def _parse(data: bytes) -> tuple[Any, str | None]:
    try:
        return json.loads(data.decode("utf-8")), None
    except UnicodeDecodeError as error:
        return None, f"is not UTF-8 ({error.reason} at byte {error.start}); convert the file"
    except (json.JSONDecodeError, RecursionError) as error:
        return None, f"is not valid JSON ({error}); write one JSON object on each line"


def _text_rows(stream: io.BufferedIOBase, separator: str | None) -> Iterator[Row]:
    """Whole files, or the parts between separators; parts without text are no documents."""
    try:
        text = stream.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"is not UTF-8 ({error.reason} at byte {error.start}); convert the file"
        yield Row("document 1", 1, None, found)
        return
    text = text.replace("\r\n", "\n")
    parts = [text] if separator is None else text.split(separator)
    documents = [part for part in parts if part.strip()]
    for number, document in enumerate(documents, 1):
        yield Row(f"document {number}", number, document)


def _parquet_rows(file: Path, progress: Callable[[int], None]) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f'{file} is Parquet, which needs pyarrow: pip install "llada-jax[data]"'
        ) from error
    size = file.stat().st_size
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            total = max(table.metadata.num_rows, 1)
            for batch in table.iter_batches(batch_size=256):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(f"row {number}", number, value)
                progress(size * number // total)
    except pyarrow.ArrowException as error:
        raise DataError(f"{file} cannot be read as Parquet: {error}") from error
