"""Our own layout: weights as one orbax checkpoint, ready to be restored onto any mesh.

    FOLDER/
      config.json      of the original checkpoint, as it was
      llada_jax.json   format, version; precision of tensors that differ from their weight's;
                       how the weights are quantised
      params/          orbax; of a quantised weight PATH: PATH/values and PATH/scales
      tokenizer.json … and the other companion files

Everything of orbax is behind this file (its v1 interface may still change).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from llada_jax.checkpoint.assemble import target_dtype, weight_sharding
from llada_jax.checkpoint.disassemble import flat_params
from llada_jax.checkpoint.errors import CheckpointError
from llada_jax.checkpoint.folder import read_config, read_json, tensor_dtypes, uneven_dtypes
from llada_jax.checkpoint.keys import pieces
from llada_jax.checkpoint.safetensors_io import DTYPES, dtype_code
from llada_jax.checkpoint.staging import copy_files, staged_folder, write_json
from llada_jax.config import ModelConfig
from llada_jax.model.quantization import (
    check_quantization,
    layers_of,
    quantization_of,
    quantize_pieces,
    quantized_shape,
    quantized_shardings,
    weight_scheme,
)
from llada_jax.model.weights import flatten_specs, weight_specs
from pallas_kernels.quantized import SCHEMES, QuantizedMatrix

MARKER = "llada_jax.json"
_PARAMS = "params"
_VERSION = 1
_QUANTIZED_VERSION = 2  # of folders with quantised weights, which earlier releases cannot read


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
    quantization = quantization_of(params)
    flat = flat_params(config, params, quantization)
    plain = {path: w for path, w in flat.items() if not isinstance(w, QuantizedMatrix)}
    uneven = uneven_dtypes(dtypes or {}, config, plain)
    marker = {
        "format": "llada_jax",
        "version": _VERSION,
        "weights": {path: array.dtype.name for path, array in plain.items()},
        "tensors": {name: dtype_code(dtype) for name, dtype in uneven.items()},
    }
    if quantization is not None:
        marker |= {"version": _QUANTIZED_VERSION, "quantization": quantization}
    with staged_folder(Path(folder)) as temporary:
        ocp.save(str(temporary / _PARAMS), _split(flat))
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
    quantization: str | None = None,
) -> tuple[ModelConfig, dict[str, Any]]:
    """Restores what ``save_native`` wrote, onto any mesh; arguments as for ``load_hf``.

    Orbax needs up to twice the size of the weights in host memory while it restores (``load_hf``
    needs them once). To quantise plain weights, one weight at a time is restored: in host memory,
    from which its layers go to the device; with a mesh, on the mesh.

    Raises:
      CheckpointError: if the folder is damaged, holds another model, or is quantised otherwise.
      ValueError: for an unknown ``quantization``.
    """
    check_quantization(quantization)
    folder = Path(folder).absolute()
    marker = _marker(folder)
    stored, present = marker["weights"], marker.get("quantization")
    if present is not None and quantization not in (None, present):
        raise CheckpointError(
            f"{folder} holds {present} weights, which cannot become {quantization}; leave "
            f"quantization out, or quantise the weights that they were made from"
        )
    config = config or read_config(folder)
    specs = flatten_specs(weight_specs(config))
    schemes = {path: weight_scheme(path, spec, present) for path, spec in specs.items()}
    expected = {path for path, scheme in schemes.items() if scheme is None}
    if stored.keys() != expected:
        difference = ", ".join(sorted(stored.keys() ^ expected)[:4])
        raise CheckpointError(
            f"{folder} does not hold the weights of this configuration (they differ in "
            f"{difference}); use the config.json that it was written with"
        )
    abstract: dict[str, Any] = {}
    for path, spec in specs.items():
        sharding, scheme = weight_sharding(spec, mesh), schemes[path]
        if scheme is not None:
            abstract[path] = jax.tree.map(
                lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place),
                quantized_shape(spec, scheme),
                quantized_shardings(spec, scheme, sharding),
            )
            continue
        kind = target_dtype(path, spec, [np.dtype(stored[path])], dtype, str(folder))
        abstract[path] = jax.ShapeDtypeStruct(spec.shape, kind, sharding=sharding)
    try:
        found = {path: tuple(leaf.shape) for path, leaf in _saved_shapes(folder).items()}
        for path, leaf in _split(abstract).items():
            if found.get(path) != leaf.shape:
                raise CheckpointError(
                    f"{path} in {folder} has shape {found.get(path)}, but config.json asks for "
                    f"{leaf.shape}; use the config.json that it was written with"
                )
        if quantization is not None and present is None:
            return config, _load_quantizing(folder, config, abstract, quantization, check_finite)
        flat = ocp.load(str(folder / _PARAMS), _split(abstract))
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
    return config, traverse_util.unflatten_dict(_join(flat, abstract), sep="/")


def _load_quantizing(
    folder: Path,
    config: ModelConfig,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    quantization: str,
    check_finite: bool,
) -> dict[str, Any]:
    """Restores weights one by one and quantises each that is to be."""
    specs = flatten_specs(weight_specs(config))
    stored = _marker(folder)["weights"]
    flat: dict[str, Any] = {}
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        for path, spec in specs.items():
            scheme, goal = weight_scheme(path, spec, quantization), abstract[path]
            if scheme is not None:  # from the precision that is stored, as the import does
                goal = jax.ShapeDtypeStruct(
                    spec.shape, np.dtype(stored[path]), sharding=_waiting_room(goal.sharding)
                )
            weight = ocp.load(str(folder / _PARAMS), {path: goal})[path]
            if check_finite:
                _refuse_not_finite(folder, config, {path: weight})
            flat[path] = (
                weight
                if scheme is None
                else quantize_pieces(layers_of(weight, spec), spec, scheme, abstract[path].sharding)
            )
    return traverse_util.unflatten_dict(flat, sep="/")


def _waiting_room(sharding: Sharding) -> Sharding:
    """Where a weight waits to be quantised: in host memory, if it is not spread over a mesh."""
    if isinstance(sharding, NamedSharding):
        return sharding
    try:
        return SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX was told to leave the CPU out
        return sharding


def _split(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays alone: a quantised weight becomes ``path/values`` and ``path/scales``."""
    arrays: dict[str, Any] = {}
    for path, weight in flat.items():
        if isinstance(weight, QuantizedMatrix):
            arrays |= {f"{path}/values": weight.values, f"{path}/scales": weight.scales}
        else:
            arrays[path] = weight
    return arrays


def _join(arrays: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``_split``; ``like`` says which weights are quantised, and how."""
    return {
        path: dataclasses.replace(
            weight, values=arrays[f"{path}/values"], scales=arrays[f"{path}/scales"]
        )
        if isinstance(weight, QuantizedMatrix)
        else arrays[path]
        for path, weight in like.items()
    }


def _saved_shapes(folder: Path) -> dict[str, Any]:
    return ocp.metadata(str(folder / _PARAMS)).metadata


def _marker(folder: Path) -> dict[str, Any]:
    marker = read_json(folder / MARKER)
    versions = _VERSION, _QUANTIZED_VERSION
    if marker.get("format") != "llada_jax" or marker.get("version") not in versions:
        raise CheckpointError(
            f"{folder / MARKER} is of format {marker.get('format')!r}, version "
            f"{marker.get('version')!r}; this library reads versions {versions}: update it"
        )
    weights, tensors = marker.get("weights"), marker.get("tensors")
    known = {dtype.name for dtype in DTYPES.values()}
    if (
        not isinstance(weights, dict)
        or not isinstance(tensors, dict)
        or not set(weights.values()) <= known
        or not set(tensors.values()) <= DTYPES.keys()
        or marker.get("quantization") not in (None, *SCHEMES)
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
      ``{per-expert tensor name: precision}``, what ``save_hf(dtypes=...)`` takes. Tensors of
      quantised weights are left out.

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
        if p.name in marker["tensors"] or p.path in marker["weights"]
    }


def stored_quantization(folder: str | os.PathLike[str]) -> str | None:
    """How the weights of a folder are quantised: ``None``, ``"int8"``, ``"fp8"`` or ``"int4"``.

    Raises:
      CheckpointError: if the folder is damaged.
    """
    return _marker(Path(folder)).get("quantization") if is_native(folder) else None


def _refuse_not_finite(folder: Path, config: ModelConfig, flat: dict[str, jax.Array]) -> None:
    """Raises if an array of ``flat`` is not finite; those of quantised weights are split."""
    blocks = pieces(config)
    of = {name: name.removesuffix("/values").removesuffix("/scales") for name in flat}
    ranks = {name: len(blocks[of[name]][0].lead) for name in flat}
    for name, finite in _finite_blocks(flat, ranks).items():
        path = of[name]
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
