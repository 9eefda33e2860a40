"""Our own layout: weights as one orbax checkpoint, ready to be restored onto any mesh.

    FOLDER/
      config.json      of the original checkpoint, as it was
      llada_jax.json   format, version; precision of tensors that differ from their weight's
      params/          orbax
      tokenizer.json … and the other companion files

Everything of orbax is behind this file (its v1 interface may still change).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from llada_jax.checkpoint.assemble import target_dtype, weight_sharding
from llada_jax.checkpoint.disassemble import flat_params
from llada_jax.checkpoint.errors import CheckpointError
from llada_jax.checkpoint.folder import read_config, read_json, tensor_dtypes, uneven_dtypes
from llada_jax.checkpoint.keys import pieces
from llada_jax.checkpoint.safetensors_io import DTYPES, dtype_code
from llada_jax.checkpoint.staging import copy_files, staged_folder, write_json
from llada_jax.config import ModelConfig
from llada_jax.model.weights import flatten_specs, weight_specs

MARKER = "llada_jax.json"
_PARAMS = "params"
_VERSION = 1


def is_native(folder: str | os.PathLike[str]) -> bool:
    """Whether ``save_native`` wrote this folder."""
    return (Path(folder) / MARKER).is_file()


def save_native(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    source_config: Mapping[str, Any] | None = None,
    dtypes: Mapping[str, np.dtype] | None = None,
    extra_files: Iterable[str | os.PathLike[str]] = (),
) -> None:
    """Writes weights with orbax; every process of a distributed run calls it.

    All or nothing: the folder appears when it is complete.

    Args:
      folder: to be created; must not exist, or be empty.
      config: the model.
      params: nested dictionaries, as ``load_hf`` returns them.
      source_config: the ``config.json`` to keep; by default one is made from ``config``.
      dtypes: ``stored_dtypes`` of the original folder, for a byte-identical export later.
      extra_files: files to copy along, such as ``companion_files(original)``.

    Raises:
      CheckpointError: if the folder is not empty or cannot be written, or if parameters and
        configuration do not fit.
    """
    flat = flat_params(config, params)
    uneven = uneven_dtypes(dtypes or {}, config, flat)
    marker = {
        "format": "llada_jax",
        "version": _VERSION,
        "weights": {path: array.dtype.name for path, array in flat.items()},
        "tensors": {name: dtype_code(dtype) for name, dtype in uneven.items()},
    }
    with staged_folder(Path(folder)) as temporary:
        ocp.save(str(temporary / _PARAMS), flat)
        if jax.process_index() == 0:
            raw = config.to_hf() if source_config is None else dict(source_config)
            write_json(temporary / "config.json", raw)
            write_json(temporary / MARKER, marker)
            copy_files(extra_files, temporary)


def load_native(
    folder: str | os.PathLike[str],
    *,
    config: ModelConfig | None = None,
    dtype: Any = None,
    mesh: Mesh | None = None,
    check_finite: bool = True,
) -> tuple[ModelConfig, dict[str, Any]]:
    """Restores what ``save_native`` wrote, onto any mesh; arguments as for ``load_hf``.

    Orbax needs up to twice the size of the weights in host memory while it restores (``load_hf``
    needs them once).

    Raises:
      CheckpointError: if the folder is damaged, or holds another model.
    """
    folder = Path(folder).absolute()
    stored = _marker(folder)["weights"]
    config = config or read_config(folder)
    specs = flatten_specs(weight_specs(config))
    if stored.keys() != specs.keys():
        difference = ", ".join(sorted(stored.keys() ^ specs.keys())[:4])
        raise CheckpointError(
            f"{folder} does not hold the weights of this configuration (they differ in "
            f"{difference}); use the config.json that it was written with"
        )
    abstract = {
        path: jax.ShapeDtypeStruct(
            spec.shape,
            target_dtype(path, spec, [np.dtype(stored[path])], dtype, str(folder)),
            sharding=weight_sharding(spec, mesh),
        )
        for path, spec in specs.items()
    }
    try:
        found = {path: tuple(leaf.shape) for path, leaf in _saved_shapes(folder).items()}
        for path, spec in specs.items():
            if found.get(path) != spec.shape:
                raise CheckpointError(
                    f"{path} in {folder} has shape {found.get(path)}, but config.json asks for "
                    f"{spec.shape}; use the config.json that it was written with"
                )
        flat = ocp.load(str(folder / _PARAMS), abstract)
    except CheckpointError:
        raise
    except Exception as error:  # orbax and tensorstore raise many types for a damaged folder
        raise CheckpointError(
            f"{folder / _PARAMS} cannot be restored ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no message'}); copy it again or "
            "convert the original once more"
        ) from error
    if check_finite:
        _refuse_not_finite(folder, config, flat)
    return config, traverse_util.unflatten_dict(flat, sep="/")


def _saved_shapes(folder: Path) -> dict[str, Any]:
    return ocp.metadata(str(folder / _PARAMS)).metadata


def _marker(folder: Path) -> dict[str, Any]:
    marker = read_json(folder / MARKER)
    if marker.get("format") != "llada_jax" or marker.get("version") != _VERSION:
        raise CheckpointError(
            f"{folder / MARKER} is of format {marker.get('format')!r}, version "
            f"{marker.get('version')!r}; this library reads version {_VERSION}: update it"
        )
    weights, tensors = marker.get("weights"), marker.get("tensors")
    known = {dtype.name for dtype in DTYPES.values()}
    if (
        not isinstance(weights, dict)
        or not isinstance(tensors, dict)
        or not set(weights.values()) <= known
        or not set(tensors.values()) <= DTYPES.keys()
    ):
        raise CheckpointError(f"{folder / MARKER} is damaged; convert the original once more")
    return marker


def stored_dtypes(
    folder: str | os.PathLike[str], config: ModelConfig | None = None
) -> dict[str, np.dtype]:
    """Precision in which every tensor is stored, or was before ``save_native``.

    Args:
      folder: a Hugging Face or a native checkpoint.
      config: the model, if not the one of ``config.json``.

    Returns:
      ``{per-expert tensor name: precision}``, what ``save_hf(dtypes=...)`` takes.

    Raises:
      CheckpointError: if the folder is damaged.
    """
    config = config or read_config(folder)
    if not is_native(folder):
        return tensor_dtypes(folder, config)
    marker = _marker(Path(folder))
    return {
        p.name: DTYPES[marker["tensors"][p.name]]
        if p.name in marker["tensors"]
        else np.dtype(marker["weights"][p.path])
        for blocks in pieces(config).values()
        for p in blocks
    }


def _refuse_not_finite(folder: Path, config: ModelConfig, flat: dict[str, jax.Array]) -> None:
    blocks = pieces(config)
    for path, finite in _finite_blocks(
        flat, {p: len(b[0].lead) for p, b in blocks.items()}
    ).items():
        for piece in blocks[path]:
            if not finite[piece.lead]:
                raise CheckpointError(
                    f"{path}{list(piece.lead)} ({piece.name}) in {folder} holds NaN or infinity; "
                    "the training diverged, or dtype is too narrow: use an earlier checkpoint"
                )


def _finite_blocks(flat: dict[str, jax.Array], rank: Mapping[str, int]) -> dict[str, np.ndarray]:
    """For each weight, whether each of its blocks is finite; one program for all of them."""

    def blocks(flat: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {
            path: jnp.isfinite(array).all(axis=tuple(range(rank[path], array.ndim)))
            for path, array in flat.items()
        }

    sharding = next(iter(flat.values())).sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())  # every process sees all of it
    return jax.tree.map(np.asarray, jax.jit(blocks, out_shardings=sharding)(flat))
