"""Reading and writing safetensors files: a JSON header, then plain bytes.

    ┌ 8 bytes: n ┬ n bytes: {"name": {"dtype", "shape", "data_offsets"}, …} ┬ tensors, no gaps ┐

Files are read with ordinary reads at an offset, not memory-mapped: pages of a mapped file count as
memory of the process, and a file that shrinks while it is mapped kills the process.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import jax.numpy as jnp
import numpy as np

from llada_jax.checkpoint.errors import CheckpointError

DTYPES: Mapping[str, np.dtype] = {
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
      name: its name in the file.
      file: the file.
      dtype: its precision.
      shape: its shape.
      offset: its first byte, counted from the start of the file.
    """

    name: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def dtype_code(dtype: Any) -> str:
    """The name that safetensors gives a precision.

    Raises:
      CheckpointError: for anything but float32, float16 and bfloat16.
    """
    code = _CODES.get(np.dtype(dtype))
    if code is None:
        raise CheckpointError(
            f"precision {np.dtype(dtype).name} is not supported; use float32, bfloat16 or float16"
        )
    return code


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Reads what a safetensors file holds, without reading any tensor.

    Raises:
      CheckpointError: if the file is truncated, is not a safetensors file, or contradicts itself.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= _MAX_HEADER:
                raise CheckpointError(
                    f"{file} is not a safetensors file (it states a header of {length} bytes)"
                    " or is truncated; fetch it again (a Git LFS pointer needs `git lfs pull`)"
                )
            text = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if len(text) < length:
        raise _truncated(file, 8 + length, size)
    try:
        header = json.loads(text, object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        tensors = {name: _parse(name, entry, file, 8 + length) for name, entry in header.items()}
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{file} has a damaged header ({type(error).__name__}: {error}); fetch it again"
        ) from error
    end = 8 + length
    for info in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if info.offset != end:
            raise CheckpointError(
                f"{file} has a damaged header: {info.name} starts at byte {info.offset}, where the "
                f"tensor before it ends at {end}; fetch it again"
            )
        end += info.nbytes
    if size < end:
        raise _truncated(file, end, size)
    if size > end:
        raise CheckpointError(
            f"{file} is {size} bytes long, its header describes {end}; fetch it again"
        )
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name occurs twice")
    return out


def _truncated(file: Path, expected: int, found: int) -> CheckpointError:
    return CheckpointError(
        f"{file} is truncated: {found} bytes of {expected}; the download or copy was interrupted, "
        "fetch it again"
    )


def _parse(name: str, entry: Mapping[str, Any], file: Path, base: int) -> TensorInfo:
    code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if code not in DTYPES:
        raise CheckpointError(
            f"{name} in {file} is stored as {code}, which is not supported; convert it to one of "
            f"{', '.join(DTYPES)} first"
        )
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"shape or offsets of {name} are not whole numbers")
    info = TensorInfo(name, file, DTYPES[code], shape, base + begin)
    if end - begin != info.nbytes:
        raise ValueError(
            f"{name} of shape {list(shape)} in {code} is given {end - begin} bytes, not "
            f"{info.nbytes}"
        )
    return info


class Reader:
    """Reads byte ranges of many files from many threads; a context manager.

    Each thread has its own handle on each file it touches.
    """

    def __init__(self):
        self._local = threading.local()
        self._lock = threading.Lock()
        self._handles: list[IO[bytes]] = []

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.close()

    def read_rows(self, info: TensorInfo, first_row: int, out: np.ndarray) -> None:
        """Fills ``out`` ``[rows, cols]`` from the tensor, looked at as rows of ``cols`` elements.

        Raises:
          CheckpointError: if the file ends early or cannot be read.
        """
        handle = self._handle(info.file)
        view = out.reshape(-1).view(np.uint8).data
        try:
            handle.seek(info.offset + first_row * out.shape[1] * info.dtype.itemsize)
            done = 0
            while done < len(view):
                count = handle.readinto(view[done:])  # type: ignore[attr-defined]
                if not count:
                    raise CheckpointError(
                        f"{info.file} ended while {info.name} was read; was it changed meanwhile?"
                    )
                done += count
        except OSError as error:
            raise CheckpointError(f"{info.file} cannot be read: {error}") from error

    def _handle(self, file: Path) -> IO[bytes]:
        handles = self._local.__dict__.setdefault("handles", {})
        if file not in handles:
            try:
                handles[file] = open(file, "rb", buffering=0)  # noqa: SIM115 closed in __exit__
            except OSError as error:
                raise CheckpointError(f"{file} cannot be read: {error}") from error
            with self._lock:
                self._handles.append(handles[file])
        return handles[file]


class Writer:
    """Writes one safetensors file, tensors in any order; a context manager.

    Args:
      file: the file to create.
      tensors: ``{name: (dtype, shape)}``. They are laid out widest type first, so that each is
        aligned to its type, and in the given order within a type.
    """

    def __init__(self, file: Path, tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]):
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        order = sorted(tensors, key=lambda name: -tensors[name][0].itemsize)
        end = 0
        self._offsets: dict[str, int] = {}
        for name in order:
            dtype, shape = tensors[name]
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            entries[name] = {
                "dtype": dtype_code(dtype),
                "shape": list(shape),
                "data_offsets": [begin, end],
            }
            self._offsets[name] = begin
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._base = 8 + len(text)
        self._stream = open(file, "wb", buffering=0)  # noqa: SIM115 closed in __exit__
        self._stream.write(struct.pack("<Q", len(text)) + text)
        self._stream.truncate(self._base + end)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def write_rows(self, name: str, first_row: int, block: np.ndarray) -> None:
        """Writes ``block`` ``[rows, cols]`` at row ``first_row`` of a tensor."""
        row_bytes = block.shape[1] * block.dtype.itemsize
        self._stream.seek(self._base + self._offsets[name] + first_row * row_bytes)
        view = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
        done = 0
        while done < len(view):
            done += self._stream.write(view[done:])
