"""From stacked, sharded weights back to tensors in files, one layer of a weight at a time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from llada_jax.checkpoint.errors import CheckpointError
from llada_jax.checkpoint.folder import INDEX, SINGLE, split_names
from llada_jax.checkpoint.keys import Piece, hf_names, pieces
from llada_jax.checkpoint.matrices import cast, chunk_rows, copy_matrix, scratch
from llada_jax.checkpoint.progress import byte_progress
from llada_jax.checkpoint.safetensors_io import Writer, dtype_code
from llada_jax.checkpoint.staging import write_json
from llada_jax.config import ModelConfig
from llada_jax.model.quantization import weight_scheme
from llada_jax.model.weights import flatten_specs, weight_specs
from pallas_kernels.quantized import QuantizedMatrix

Array: TypeAlias = jax.Array | np.ndarray
Tensors: TypeAlias = dict[str, tuple[np.dtype, tuple[int, ...]]]  # name -> precision, shape


def flat_params(
    config: ModelConfig, params: Mapping[str, Any], quantization: str | None = None
) -> dict[str, Any]:
    """Flattens parameters to ``{path: array}``, after comparing them with the model's weights.

    Args:
      config: the model.
      params: nested dictionaries.
      quantization: how they are quantised; ``None`` refuses quantised weights.

    Raises:
      CheckpointError: naming a missing, unexpected or mis-shaped weight, or one of a precision
        that safetensors export does not support.
    """
    specs = flatten_specs(weight_specs(config))
    flat: dict[str, Any] = dict(traverse_util.flatten_dict(params, sep="/"))
    missing = [path for path in specs if path not in flat]
    unexpected = [path for path in flat if path not in specs]
    if missing or unexpected:
        raise CheckpointError(
            "the parameters are not those of this configuration: "
            f"missing {', '.join(missing) or 'none'}; unexpected {', '.join(unexpected) or 'none'}"
        )
    for path, spec in specs.items():
        weight, scheme = flat[path], weight_scheme(path, spec, quantization)
        found = weight.scheme if isinstance(weight, QuantizedMatrix) else None
        if found != scheme and quantization is None:
            raise CheckpointError(
                f"{path} is quantised ({found}), which the Hugging Face layout has no place for; "
                "write it with save_native, or export the weights that it was made from "
                "(dequantize_params gives rounded ones)"
            )
        if found != scheme:
            raise CheckpointError(
                f"{path} is of scheme {found}, not {scheme} as in {quantization} models; use "
                "quantize_params"
            )
        shape = spec.fold.shape(spec.shape) if spec.fold is not None and scheme else spec.shape
        if tuple(weight.shape) != shape:
            raise CheckpointError(
                f"{path} has shape {list(weight.shape)}, but the configuration asks for "
                f"{list(shape)}"
            )
        if scheme is not None:
            continue
        try:
            dtype_code(flat[path].dtype)
        except (CheckpointError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be written: {error}") from error
    return {path: flat[path] for path in specs}


def plan_files(tensors: Tensors, max_bytes: int) -> dict[str, list[str]]:
    """Distributes tensors over files, in order: ``{file: names}``.

    A file is closed when the next tensor would make it larger than ``max_bytes``.
    """
    groups: list[list[str]] = [[]]
    size = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if groups[-1] and size + nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": g for i, g in enumerate(groups, 1)}


def write_tensors(
    folder: Path,
    config: ModelConfig,
    params: Mapping[str, Array],
    *,
    dtypes: Mapping[str, np.dtype],
    max_shard_bytes: int,
    merged_experts: bool,
    progress: bool,
) -> None:
    """Writes flat parameters as safetensors files, with an index if they are several.

    Args:
      dtypes: precision of a tensor by its per-expert name, where it is not that of its weight.
    """
    blocks = pieces(config, merged_experts)
    tensors = _tensors(config, params, blocks, dtypes, merged_experts)
    plan = plan_files(tensors, max_shard_bytes)
    file_of = {name: file for file, names in plan.items() for name in names}
    total = sum(math.prod(shape) * dtype.itemsize for dtype, shape in tensors.values())
    with contextlib.ExitStack() as stack:
        writers = {
            file: stack.enter_context(Writer(folder / file, {n: tensors[n] for n in names}))
            for file, names in plan.items()
        }
        advance = stack.enter_context(byte_progress("writing weights", total, progress))
        for path, array in params.items():
            for piece, block in _host_blocks(array, blocks[path]):
                writer = writers[file_of[piece.name]]
                advance(_write_block(writer, piece, block, tensors[piece.name][0]))
    if len(plan) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(file_of.items()))}
        write_json(folder / INDEX, index)


def _tensors(
    config: ModelConfig,
    params: Mapping[str, Array],
    blocks: Mapping[str, tuple[Piece, ...]],
    dtypes: Mapping[str, np.dtype],
    merged: bool,
) -> Tensors:
    """Precision and shape of each tensor; of a shared tensor, the precision that holds all."""
    names = split_names(config)
    found: dict[str, set[np.dtype]] = {}
    for path, array in params.items():
        for piece in blocks[path]:
            dtype = dtypes.get(names[path, piece.lead], array.dtype)
            found.setdefault(piece.name, set()).add(np.dtype(dtype))
    return {
        name: (np.dtype(jnp.result_type(*found[name])), shape)
        for name, shape in hf_names(config, merged).items()
    }


def _write_block(writer: Writer, piece: Piece, block: np.ndarray, dtype: np.dtype) -> int:
    """Writes one block, oriented like ours, and returns how many bytes that were."""
    matrix = block.reshape(piece.cols, piece.rows).T if piece.transposed else block
    matrix = matrix.reshape(piece.rows, piece.cols)
    step = chunk_rows(piece.cols, matrix.dtype.itemsize)
    for row in range(0, piece.rows, step):
        rows = matrix[row : row + step]
        if piece.transposed:
            straight = scratch(len(rows), piece.cols, rows.dtype)
            copy_matrix(straight, rows)
            rows = straight
        writer.write_rows(piece.name, piece.start + row, cast(rows, dtype))
    return piece.rows * piece.cols * dtype.itemsize


def _host_blocks(array: Array, blocks: tuple[Piece, ...]) -> Iterator[tuple[Piece, np.ndarray]]:
    """All blocks of a weight in host memory, at most one layer of it at a time."""
    if not blocks[0].lead:
        yield blocks[0], _to_host(array, None)
        return
    layer, values = None, None
    for piece in blocks:
        if piece.lead[0] != layer:
            layer = piece.lead[0]
            values = None  # let go of the layer before
            values = _to_host(array, layer)
        assert values is not None
        yield piece, values[piece.lead[1:]]


def _to_host(array: Array, layer: int | None) -> np.ndarray:
    """One layer (or, with ``None``, all) of an array; a view where the array is on this CPU."""
    if isinstance(array, np.ndarray):
        return array if layer is None else array[layer]
    shards = [s for s in array.addressable_shards if s.replica_id == 0]
    if any(d.platform != "cpu" for d in array.sharding.device_set):
        # A new array each time: what np.asarray fetches stays attached to the array it is asked of.
        fetched = jnp.array(array, copy=True) if layer is None else _layer(array, jnp.int32(layer))
        return np.asarray(fetched)
    if len(shards) == 1:
        whole = np.asarray(shards[0].data)
        return whole if layer is None else whole[layer]
    out = np.empty(array.shape if layer is None else array.shape[1:], array.dtype)
    for shard in shards:
        index, data = shard.index, np.asarray(shard.data)
        if layer is not None:
            start, stop, _ = index[0].indices(array.shape[0])
            if not start <= layer < stop:
                continue
            index, data = index[1:], data[layer - start]
        out[index] = data
    return out


@jax.jit
def _layer(array: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)
