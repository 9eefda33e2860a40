"""Tokenised files on disk: written once, mapped into memory by every later run.

A cache entry is a folder, named by the hash of all that it depends on:

    tokens.bin        int32, all documents one after the other
    offsets.npy       where each document begins, and the end
    spans.npy         supervised ranges, relative to their documents; span_offsets.npy likewise
    is_text.npy       which documents are plain text
    hashes.npy        of each document's prompt (a text's of all of it), for splitting
    numbers.npy       which line, row or document of the file it was
    meta.json         counts, and what was wrong with rows that were left out
"""

from __future__ import annotations

import array
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt64

from llada_jax.data.errors import DataError
from llada_jax.data.tokenize import Document

_MAX_EXAMPLES = 5  # of bad rows that are kept for the report


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """A cache entry: the documents of one file.

    Attributes:
      folder: where it lies.
      file: what was tokenised, for messages.
    """

    folder: Path
    file: Path

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "file": self.file}  # a worker maps the arrays itself

    @functools.cached_property
    def meta(self) -> dict[str, Any]:
        """``documents``, ``tokens``, the ``unit`` of ``numbers``, ``bad_rows``, a few ``bad``."""
        return json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))

    @functools.cached_property
    def tokens(self) -> Int32[np.ndarray, " tokens"]:
        """All tokens, mapped."""
        if not self.meta["tokens"]:
            return np.zeros(0, np.int32)  # an empty file cannot be mapped
        return np.memmap(self.folder / "tokens.bin", np.int32, mode="r")

    @functools.cached_property
    def offsets(self) -> Int64[np.ndarray, " documents_and_end"]:
        """Where each document begins, and the end."""
        return self._load("offsets")

    @functools.cached_property
    def is_text(self) -> Bool[np.ndarray, " documents"]:
        """Which documents are plain text."""
        return self._load("is_text")

    @functools.cached_property
    def hashes(self) -> UInt64[np.ndarray, " documents"]:
        """Hashes of the documents' prompts."""
        return self._load("hashes")

    @functools.cached_property
    def numbers(self) -> Int64[np.ndarray, " documents"]:
        """Which line or row of the file each document was."""
        return self._load("numbers")

    @functools.cached_property
    def spans(self) -> Int32[np.ndarray, "spans 2"]:
        """Supervised ranges of all documents."""
        return self._load("spans")

    @functools.cached_property
    def span_offsets(self) -> Int64[np.ndarray, " documents_and_end"]:
        """Where each document's ranges begin in ``spans``, and the end."""
        return self._load("span_offsets")

    def read(self, index: int, start: int = 0, stop: int | None = None) -> Document:
        """A document, or a part of it.

        Args:
          index: which one.
          start, stop: the part.
        """
        begin, end = int(self.offsets[index]), int(self.offsets[index + 1])
        stop = end - begin if stop is None else stop
        tokens = np.array(self.tokens[begin + start : begin + stop])
        spans = self.spans[self.span_offsets[index] : self.span_offsets[index + 1]]
        cut = np.clip(spans - start, 0, stop - start)
        inside = tuple((int(a), int(b)) for a, b in cut if a < b)
        return Document(tokens, inside, bool(self.is_text[index]))

    def _load(self, name: str) -> np.ndarray:
        return np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)


class TokenWriter:
    """Collects documents and turns them into a cache entry, all or nothing.

    Args:
      folder: where the entry is to lie.

    Raises:
      OSError: if nothing can be written there.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._draft = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder.parent))
        self._tokens = (self._draft / "tokens.bin").open("wb")
        self._offsets = array.array("q", [0])
        self._span_offsets = array.array("q", [0])
        self._spans = array.array("i")
        self._is_text = bytearray()
        self._hashes = array.array("Q")
        self._numbers = array.array("q")
        self._unit = "record"
        self._bad: list[str] = []
        self._num_bad = 0

    def add(self, document: Document, number: int, place: str = "") -> None:
        """Appends a document, the ``number``-th record of its file, such as ``"line 3"``."""
        self._unit = place.partition(" ")[0] or self._unit
        self._tokens.write(document.tokens.tobytes())
        self._offsets.append(self._offsets[-1] + len(document.tokens))
        for span in document.spans:
            self._spans.extend(span)
        self._span_offsets.append(len(self._spans) // 2)
        self._is_text.append(document.is_text)
        prompt = len(document.tokens) if document.is_text else document.spans[0][0]
        data = document.tokens[:prompt].tobytes()
        self._hashes.append(int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little"))
        self._numbers.append(number)

    def add_bad(self, message: str) -> None:
        """Counts a row that was left out."""
        self._num_bad += 1
        if len(self._bad) < _MAX_EXAMPLES:
            self._bad.append(message)

    def finish(self) -> None:
        """Writes the rest and moves the entry to its place.

        Another process may have been faster: its entry is then as good.
        """
        self._tokens.close()
        arrays = {
            "offsets": np.array(self._offsets, np.int64),
            "span_offsets": np.array(self._span_offsets, np.int64),
            "spans": np.array(self._spans, np.int32).reshape(-1, 2),
            "is_text": np.array(self._is_text, bool),
            "hashes": np.array(self._hashes, np.uint64),
            "numbers": np.array(self._numbers, np.int64),
        }
        for name, values in arrays.items():
            np.save(self._draft / f"{name}.npy", values)
        meta = {
            "documents": len(self._numbers),
            "tokens": self._offsets[-1],
            "unit": self._unit,
            "bad_rows": self._num_bad,
            "bad": self._bad,
        }
        (self._draft / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        try:
            os.rename(self._draft, self._folder)
        except OSError:
            if not is_complete(self._folder):
                shutil.rmtree(self._folder, ignore_errors=True)
                os.rename(self._draft, self._folder)
            shutil.rmtree(self._draft, ignore_errors=True)

    def abandon(self) -> None:
        """Removes what has been written."""
        self._tokens.close()
        shutil.rmtree(self._draft, ignore_errors=True)


def is_complete(folder: Path) -> bool:
    """Whether a cache entry exists and has the size that it says."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        return (folder / "tokens.bin").stat().st_size == 4 * meta["tokens"]
    except (OSError, ValueError, KeyError):
        return False


def cache_folder(cache_dir: str | None) -> Path:
    """Where tokenised files are kept.

    Args:
      cache_dir: as configured; ``None`` for ``llada_jax/tokens`` in the user's cache folder, or in
        the folder for temporary files if that cannot be written.

    Raises:
      DataError: if the configured folder cannot be written.
    """
    if cache_dir is not None:
        folder = Path(cache_dir).expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cache_dir = {cache_dir} cannot be written: {error}") from error
        return folder
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "llada_jax" / "tokens"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    return folder if writable else Path(tempfile.gettempdir()) / f"llada_jax_tokens_{os.getuid()}"
