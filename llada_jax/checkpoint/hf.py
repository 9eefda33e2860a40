"""Import and export of the Hugging Face layout: ``config.json`` and ``*.safetensors``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from llada_jax.checkpoint.assemble import assemble
from llada_jax.checkpoint.disassemble import Array, flat_params, write_tensors
from llada_jax.checkpoint.errors import CheckpointError
from llada_jax.checkpoint.folder import check_tensors, list_tensors, read_config
from llada_jax.checkpoint.keys import hf_names
from llada_jax.checkpoint.staging import copy_files, staged_folder, write_json
from llada_jax.config import ConfigError, ModelConfig
from llada_jax.model.quantization import check_quantization

_MODEL_TYPE = {False: "llada2_moe", True: "llada2_moe_veomni"}  # by merged experts


def load_hf(
    folder: str | os.PathLike[str],
    *,
    config: ModelConfig | None = None,
    dtype: Any = None,
    mesh: Mesh | None = None,
    progress: bool = False,
    check_finite: bool = True,
    quantization: str | None = None,
) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads a Hugging Face checkpoint into stacked weights.

    Weights go where they belong at once: a process reads only what its devices hold, and nothing
    is in memory twice.

    Args:
      folder: holds ``config.json`` and one or many ``*.safetensors``, with one tensor an expert
        or with merged experts.
      config: the model, if not the one of ``config.json``.
      dtype: precision of the weights; the router keeps the stored one. ``None`` keeps what is
        stored; layers of one weight that are stored differently get the precision that holds them
        all (for a byte-identical export, hand ``save_hf`` the folder's ``stored_dtypes``).
      mesh: shard over this mesh by the rules table; otherwise all goes to the default device.
      progress: show a bar.
      check_finite: refuse NaN and infinity.
      quantization: ``"int8"``, ``"fp8"`` or ``"int4"``: quantise each layer of each weight as soon
        as it is read, from its stored precision (``quantize_params`` does the same later).

    Returns:
      The configuration, and the parameters as nested dictionaries.

    Raises:
      CheckpointError: if anything is missing, damaged, or does not belong together. It is raised
        before any weight is read, except for values that are not finite.
      ValueError: for an unknown ``quantization``.
    """
    check_quantization(quantization)
    tensors = list_tensors(folder)
    config = config or read_config(folder)
    merged = check_tensors(folder, tensors, config)
    params = assemble(
        tensors,
        config,
        merged=merged,
        dtype=dtype,
        mesh=mesh,
        progress=progress,
        check_finite=check_finite,
        quantization=quantization,
    )
    return config, params


def save_hf(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    source_config: Mapping[str, Any] | None = None,
    dtypes: Mapping[str, np.dtype] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    merged_experts: bool = False,
    extra_files: Iterable[str | os.PathLike[str]] = (),
    progress: bool = False,
) -> None:
    """Writes a Hugging Face checkpoint that the released PyTorch code loads.

    All or nothing: the folder appears when it is complete.

    Args:
      folder: to be created; must not exist, or be empty.
      config: the model.
      params: nested dictionaries, as ``load_hf`` returns them.
      source_config: the ``config.json`` to write, as it was read. Only ``model_type`` is adapted,
        and only if the expert layout is another one than it says.
      dtypes: precision of tensors (by per-expert name) that are to be stored in another one than
        that of their weight; ``stored_dtypes`` of the original folder restores it exactly.
      max_shard_bytes: several files with an index are written beyond this size.
      merged_experts: one tensor for all experts of a layer (the training layout).
      extra_files: files to copy along, such as ``companion_files(original)``.
      progress: show a bar.

    Raises:
      CheckpointError: if the folder is not empty or cannot be written, or if parameters and
        configuration do not fit.
    """
    flat = flat_params(config, params)
    if not all(getattr(array, "is_fully_addressable", True) for array in flat.values()):
        raise CheckpointError(
            "the weights are spread over several processes; write them with save_native, and "
            "convert that folder in a single process"
        )
    raw = _config_json(config, source_config, flat, merged_experts)
    with staged_folder(Path(folder)) as temporary:
        write_json(temporary / "config.json", raw)
        write_tensors(
            temporary,
            config,
            flat,
            dtypes=dtypes or {},
            max_shard_bytes=max_shard_bytes,
            merged_experts=merged_experts,
            progress=progress,
        )
        copy_files(extra_files, temporary)


def _config_json(
    config: ModelConfig,
    source: Mapping[str, Any] | None,
    flat: Mapping[str, Array],
    merged: bool,
) -> dict[str, Any]:
    if source is None:
        raw = config.to_hf() | {"dtype": flat["embed/embedding"].dtype.name}
    else:
        raw = dict(source)
        try:
            fits = hf_names(ModelConfig.from_hf(raw)) == hf_names(config)
        except ConfigError as error:
            raise CheckpointError(f"source_config: {error}") from error
        if not fits:
            raise CheckpointError(
                "source_config describes other weights than config; leave it out, and a new "
                "config.json is written"
            )
    if config.num_moe_layers and raw.get("model_type") != _MODEL_TYPE[merged]:
        raw["model_type"] = _MODEL_TYPE[merged]
    return raw
