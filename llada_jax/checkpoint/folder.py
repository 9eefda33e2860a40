"""What a Hugging Face checkpoint folder holds, checked before any tensor is read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llada_jax.checkpoint.errors import CheckpointError
from llada_jax.checkpoint.keys import Piece, hf_names, pieces, uses_merged_experts
from llada_jax.checkpoint.safetensors_io import TensorInfo, read_header
from llada_jax.config import ConfigError, ModelConfig

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON file that holds one object.

    Raises:
      CheckpointError: if it is not there, or is something else.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{file} does not exist; give a folder with config.json and *.safetensors, or one "
            "that save_native wrote"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}; fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} must hold one object, not {type(value).__name__}")
    return value


def read_source_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The folder's ``config.json``, as it is.

    Raises:
      CheckpointError: if it is missing or damaged.
    """
    return read_json(Path(folder) / "config.json")


def read_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """The model that the folder's ``config.json`` describes.

    Raises:
      CheckpointError: if it is missing, damaged, or of another architecture.
    """
    try:
        return ModelConfig.from_hf(read_source_config(folder))
    except ConfigError as error:
        raise CheckpointError(f"{Path(folder) / 'config.json'}: {error}") from error


def list_tensors(folder: str | os.PathLike[str]) -> dict[str, TensorInfo]:
    """Finds all tensors of a folder.

    The index says where they are; without one, ``model.safetensors`` holds them all, or else all
    ``*.safetensors`` files together do.

    Raises:
      CheckpointError: if there are none, a file is missing or damaged, or the index and the files
        contradict each other.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"folder {folder} does not exist")
    if (folder / INDEX).is_file():
        return _indexed(folder)
    single = folder / SINGLE
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"no *.safetensors file in {folder}; give the folder of a downloaded or exported model "
            "(a PyTorch *.bin checkpoint must be saved as safetensors first)"
        )
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_header(file).items():
            if name in tensors:
                raise CheckpointError(
                    f"{name} is both in {tensors[name].file} and in {file}; remove one of the "
                    f"files, or add {INDEX}"
                )
            tensors[name] = info
    return tensors


def _indexed(folder: Path) -> dict[str, TensorInfo]:
    index = folder / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map of names to files; fetch it again")
    headers: dict[str, dict[str, TensorInfo]] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise CheckpointError(f"{index} names {file!r}, which is not a file of its folder")
        if not (folder / file).is_file():
            raise CheckpointError(
                f"{index} names {file}, which is not in the folder; the download is incomplete, "
                "fetch that file"
            )
        headers[file] = read_header(folder / file)
    tensors: dict[str, TensorInfo] = {}
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise CheckpointError(
                f"{index} says that {name} is in {file}, but it is not; fetch both again"
            )
        tensors[name] = headers[file][name]
    for header in headers.values():
        for name, info in header.items():
            tensors.setdefault(name, info)  # not in the index: used, or refused as unexpected
    return tensors


def check_tensors(
    folder: str | os.PathLike[str], tensors: Mapping[str, TensorInfo], config: ModelConfig
) -> bool:
    """Compares the tensors found with those that the model needs.

    Returns:
      Whether the experts are merged.

    Raises:
      CheckpointError: naming missing, unexpected or mis-shaped tensors.
    """
    merged = uses_merged_experts(tensors)
    needed = hf_names(config, merged)
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {_several(missing, len(needed))}; the download is incomplete, or "
            "config.json belongs to another model"
        )
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()  # redundant, but common
    unexpected = [f"{n} ({tensors[n].file.name})" for n in tensors if n not in needed.keys() | tied]
    if unexpected:
        raise CheckpointError(
            f"{folder} holds {_several(unexpected, len(tensors))} that this model has no place for;"
            " config.json belongs to another model, or the file to another architecture"
        )
    wrong = [
        f"{name} in {tensors[name].file} has shape {list(tensors[name].shape)}, but config.json "
        f"asks for {list(shape)}"
        for name, shape in needed.items()
        if tensors[name].shape != shape
    ]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise CheckpointError(f"{wrong[0]}{more}; use the config.json that came with the weights")
    return merged


def _several(names: Sequence[str], total: int, shown: int = 4) -> str:
    """``"2 of 130 tensors: a, b"``; long lists are cut."""
    rest = ", …" if len(names) > shown else ""
    return f"{len(names)} of {total} tensors: {', '.join(names[:shown])}{rest}"


def split_names(config: ModelConfig) -> dict[tuple[str, tuple[int, ...]], str]:
    """``{(path, lead): name}``: the per-expert tensor of each block, whatever the layout."""
    return {(p.path, p.lead): p.name for blocks in pieces(config).values() for p in blocks}


def tensor_dtypes(folder: str | os.PathLike[str], config: ModelConfig) -> dict[str, np.dtype]:
    """Stored precision of every tensor, under its per-expert name, whatever the layout.

    Raises:
      CheckpointError: as ``list_tensors`` and ``check_tensors``.
    """
    tensors = list_tensors(folder)
    merged = check_tensors(folder, tensors, config)
    names = split_names(config)
    return {
        names[p.path, p.lead]: tensors[p.name].dtype
        for blocks in pieces(config, merged).values()
        for p in blocks
    }


def uneven_dtypes(
    dtypes: Mapping[str, np.dtype],
    config: ModelConfig,
    params: Mapping[str, jax.Array | np.ndarray],
) -> dict[str, np.dtype]:
    """Those of ``dtypes`` that differ from the precision of the (flat) weight they went into.

    Weights that are not among ``params`` are left out.
    """

    def differs(piece: Piece) -> bool:
        known = piece.name in dtypes and piece.path in params
        return known and dtypes[piece.name] != params[piece.path].dtype

    blocks = (p for ps in pieces(config).values() for p in ps)
    return {p.name: dtypes[p.name] for p in blocks if differs(p)}
