"""From tensors in files to stacked, sharded weights, with one copy in memory.

    file ──read──► scratch, 8 MB a thread ──check, cast, transpose──► host buffer of one shard
                                                                           │
                                     CPU: the array is this buffer; else one transfer to the device

A process reads only rows that its devices hold (whole rows: of a weight that is sharded over
columns, each process reads all and keeps its part). On a CPU the buffers are the arrays. On an
accelerator at most ``STAGING_BYTES`` of them (or one shard) exist at a time.

Weights that are to be quantised are assembled layer by layer, and each layer is quantised where it
goes before the next one is read: the device holds the quantised model and one layer of one weight.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from llada_jax.checkpoint.errors import CheckpointError
from llada_jax.checkpoint.keys import Piece, pieces
from llada_jax.checkpoint.matrices import (
    aligned_empty,
    all_finite,
    cast,
    chunk_rows,
    copy_matrix,
    scratch,
)
from llada_jax.checkpoint.progress import byte_progress
from llada_jax.checkpoint.safetensors_io import Reader, TensorInfo, dtype_code
from llada_jax.config import ModelConfig
from llada_jax.model.quantization import quantize_pieces, weight_scheme
from llada_jax.model.weights import WeightSpec, flatten_specs, weight_specs
from llada_jax.parallel import named_sharding

STAGING_BYTES = 4 << 30

Bounds: TypeAlias = tuple[tuple[int, int], ...]  # one [start, stop) a dimension


@dataclasses.dataclass
class _Part:
    """A distinct part of a weight that devices of this process hold.

    ``bounds`` are those of the part in the whole weight; ``rows`` and ``cols`` are the same for
    one block, in the tensor's orientation.
    """

    bounds: Bounds
    rows: tuple[int, int]
    cols: tuple[int, int]
    lead: Bounds
    transposed: bool
    devices: list[Any]
    buffer: np.ndarray | None = None

    def holds(self, lead: tuple[int, ...]) -> bool:
        return all(a <= i < b for i, (a, b) in zip(lead, self.lead, strict=True))

    def block(self, lead: tuple[int, ...]) -> np.ndarray:
        """This part's share of one block: a view of the buffer, oriented like the tensor."""
        assert self.buffer is not None
        local = tuple(i - a for i, (a, _) in zip(lead, self.lead, strict=True))
        height, width = self.rows[1] - self.rows[0], self.cols[1] - self.cols[0]
        if self.transposed:
            return self.buffer[local].reshape(width, height).T
        return self.buffer[local].reshape(height, width)


@dataclasses.dataclass
class _Weight:
    """One weight or layer of it: its pieces, where it goes, the batches that it is assembled in."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: Sharding
    pieces: Sequence[Piece]
    batches: list[list[_Part]]


@dataclasses.dataclass(frozen=True, slots=True)
class _Job:
    """Rows of one piece to read, check, cast and hand to the parts that hold some of them."""

    piece: Piece
    rows: tuple[int, int]
    parts: Sequence[_Part]


def assemble(
    tensors: Mapping[str, TensorInfo],
    config: ModelConfig,
    *,
    merged: bool,
    dtype: Any,
    mesh: Mesh | None,
    progress: bool,
    check_finite: bool,
    quantization: str | None = None,
) -> dict[str, Any]:
    """Reads all weights of ``config``; the arguments are those of ``load_hf``.

    Args:
      tensors: where each tensor lies, already compared with ``config``.
      merged: whether the experts are merged.

    Returns:
      The nested parameters.
    """
    blocks = pieces(config, merged)
    specs = flatten_specs(weight_specs(config))
    schemes = {path: weight_scheme(path, spec, quantization) for path, spec in specs.items()}
    plans: dict[str, list[_Weight]] = {}
    for path, spec in specs.items():
        if schemes[path] is None:
            plans[path] = [_plan(path, spec, blocks[path], tensors, dtype, mesh)]
        else:  # from the precision that is stored: the result does not depend on dtype
            layers = range(spec.shape[0]) if blocks[path][0].lead else [None]
            plans[path] = [_plan(path, spec, blocks[path], tensors, None, mesh, i) for i in layers]
    jobs = {
        id(w): [list(_jobs(w, batch, tensors)) for batch in w.batches]
        for plan in plans.values()
        for w in plan
    }
    total = sum(_nbytes(j, tensors) for batches in jobs.values() for b in batches for j in b)
    params: dict[str, Any] = {}
    with (
        Reader() as reader,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        byte_progress("loading weights", total, progress) as advance,
    ):

        def read(weight: _Weight) -> jax.Array:
            def run(job: _Job) -> int:
                _run(job, reader, tensors[job.piece.name], weight.dtype, check_finite)
                return _nbytes(job, tensors)

            arrays: dict[Any, jax.Array] = {}
            for batch, batch_jobs in zip(weight.batches, jobs[id(weight)], strict=True):
                for part in batch:
                    shape = tuple(b - a for a, b in part.bounds)
                    part.buffer = aligned_empty(shape, weight.dtype)
                for count in pool.map(run, batch_jobs):
                    advance(count)
                for part in batch:
                    for device in part.devices:
                        arrays[device] = jax.device_put(part.buffer, device)
                    part.buffer = None
                jax.block_until_ready(list(arrays.values()))
            return jax.make_array_from_single_device_arrays(
                weight.shape,
                weight.sharding,
                [arrays[d] for d in weight.sharding.addressable_devices_indices_map(weight.shape)],
                dtype=weight.dtype,
            )

        for path, plan in plans.items():
            scheme, sharding = schemes[path], plan[0].sharding
            if scheme is None:
                params[path] = read(plan[0])
            else:
                params[path] = quantize_pieces(map(read, plan), specs[path], scheme, sharding)
    return traverse_util.unflatten_dict(params, sep="/")


def target_dtype(
    path: str, spec: WeightSpec, stored: Sequence[np.dtype], dtype: Any, where: str
) -> np.dtype:
    """The precision of a weight in memory.

    Args:
      path: its path, for the error.
      spec: its declaration.
      stored: the precisions it is stored in; the one that holds them all is taken.
      dtype: the precision that was asked for, or ``None``.
      where: whose precisions these are, for the error.

    Raises:
      CheckpointError: if ``dtype`` is not a supported precision.
    """
    if dtype is None or spec.keep_dtype:
        return np.dtype(jnp.result_type(*set(stored)))
    try:
        dtype_code(dtype)
    except (CheckpointError, TypeError) as error:
        raise CheckpointError(
            f"{path} of {where} cannot be loaded as {dtype!r}: {error}"
        ) from error
    return np.dtype(dtype)


def weight_sharding(spec: WeightSpec, mesh: Mesh | None) -> Sharding:
    """Where a weight goes: by the rules table on a mesh, else to the default device."""
    if mesh is not None:
        return named_sharding(spec.axes, spec.shape, mesh)
    return SingleDeviceSharding(next(iter(jnp.zeros(()).devices())))


def _plan(
    path: str,
    spec: WeightSpec,
    blocks: Sequence[Piece],
    tensors: Mapping[str, TensorInfo],
    dtype: Any,
    mesh: Mesh | None,
    layer: int | None = None,
) -> _Weight:
    """The plan of a weight, or of one layer of it, ``[1, ...]``."""
    stored = [tensors[p.name].dtype for p in blocks]
    out = target_dtype(path, spec, stored, dtype, str(tensors[blocks[0].name].file.parent))
    sharding = weight_sharding(spec, mesh)
    shape = spec.shape if layer is None else (1, *spec.shape[1:])
    if layer is not None:
        blocks = [p for p in blocks if p.lead[0] == layer]
    parts: dict[Bounds, _Part] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        bounds = tuple(
            s.indices(size)[:2] for s, size in zip(index, shape, strict=True)
        )  # [start, stop)
        if layer is not None:
            bounds = ((layer, layer + 1), *bounds[1:])
        if bounds not in parts:
            parts[bounds] = _part(path, spec.shape, bounds, blocks[0])
        parts[bounds].devices.append(device)
    on_cpu = all(d.platform == "cpu" for p in parts.values() for d in p.devices)
    size = max((math.prod(b - a for a, b in bounds) for bounds in parts), default=0) * out.itemsize
    groups = batches(list(parts.values()), size, on_cpu=on_cpu)
    return _Weight(path, shape, out, sharding, blocks, groups)


def batches(parts: Sequence[Any], size: int, *, on_cpu: bool) -> list[list[Any]]:
    """Splits parts of ``size`` bytes into those that are in host memory at the same time."""
    count = max(1, len(parts) if on_cpu else STAGING_BYTES // max(1, size))
    return [list(parts[i : i + count]) for i in range(0, len(parts), count)]


def _part(path: str, shape: tuple[int, ...], bounds: Bounds, piece: Piece) -> _Part:
    """Translates bounds in our axes into rows and columns of the tensor."""
    rank = len(piece.lead)
    block, dims = shape[rank:], bounds[rank:]
    first = _flat_range(path, block[: piece.split], dims[: piece.split])
    second = _flat_range(path, block[piece.split :], dims[piece.split :])
    rows, cols = (second, first) if piece.transposed else (first, second)
    return _Part(bounds, rows, cols, bounds[:rank], piece.transposed, [])


def _flat_range(path: str, sizes: tuple[int, ...], bounds: Bounds) -> tuple[int, int]:
    """The range that ``bounds`` cover in the flattened axes; only the first may be partial."""
    if not sizes:
        return 0, 1
    if any(b != (0, size) for b, size in zip(bounds[1:], sizes[1:], strict=True)):
        raise CheckpointError(
            f"{path} is sharded over an inner axis of its tensor ({bounds} of {sizes}), which the "
            "import cannot slice; shard its first axis instead, or load without a mesh"
        )
    inner = math.prod(sizes[1:])
    return bounds[0][0] * inner, bounds[0][1] * inner


def _jobs(
    weight: _Weight, batch: Sequence[_Part], tensors: Mapping[str, TensorInfo]
) -> Iterator[_Job]:
    for piece in weight.pieces:
        parts = [p for p in batch if p.holds(piece.lead)]
        step = chunk_rows(piece.cols, tensors[piece.name].dtype.itemsize)
        for start, stop in _merge([p.rows for p in parts]):
            for row in range(start, stop, step):
                end = min(row + step, stop)
                here = [p for p in parts if p.rows[0] < end and row < p.rows[1]]
                yield _Job(piece, (row, end), here)


def _merge(ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Joins ranges that touch or overlap."""
    start = stop = None
    for a, b in sorted(set(ranges)):
        if start is None or stop is None:
            start, stop = a, b
        elif a <= stop:
            stop = max(stop, b)
        else:
            yield start, stop
            start, stop = a, b
    if start is not None and stop is not None:
        yield start, stop


def _nbytes(job: _Job, tensors: Mapping[str, TensorInfo]) -> int:
    rows = job.rows[1] - job.rows[0]
    return rows * job.piece.cols * tensors[job.piece.name].dtype.itemsize


def _run(job: _Job, reader: Reader, info: TensorInfo, dtype: np.dtype, check_finite: bool) -> None:
    piece, (start, stop) = job.piece, job.rows
    block = scratch(stop - start, piece.cols, info.dtype)
    reader.read_rows(info, piece.start + start, block)
    stored, block = block, cast(block, dtype)
    if check_finite and not all_finite(block):
        raise not_finite(info, piece.start + start, stored, block)
    for part in job.parts:
        low, high = max(start, part.rows[0]), min(stop, part.rows[1])
        out = part.block(piece.lead)[low - part.rows[0] : high - part.rows[0]]
        copy_matrix(out, block[low - start : high - start, slice(*part.cols)])


def not_finite(
    info: TensorInfo, first_row: int, stored: np.ndarray, block: np.ndarray
) -> CheckpointError:
    """The error for a block that is not finite after the cast, and maybe not before."""
    bad = ~np.isfinite(block.astype(np.float32))
    row, col = (int(i) for i in np.argwhere(bad)[0])
    place = np.unravel_index((first_row + row) * block.shape[1] + col, info.shape)
    position = f"{info.name} in {info.file} at {[int(i) for i in place]}"
    if all_finite(stored):
        return CheckpointError(
            f"{position} is {float(stored[row, col]):g}, too large for {block.dtype.name}; load as "
            "bfloat16 or float32"
        )
    return CheckpointError(
        f"{position} is {float(stored[row, col])}; the file is damaged or the training diverged: "
        "fetch it again, or use an earlier checkpoint"
    )
