"""One door for both layouts: load what is there, convert one into the other."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llada_jax.checkpoint.errors import CheckpointError
from llada_jax.checkpoint.folder import read_source_config
from llada_jax.checkpoint.hf import load_hf, save_hf
from llada_jax.checkpoint.native import (
    is_native,
    load_native,
    save_native,
    stored_dtypes,
    stored_quantization,
)
from llada_jax.checkpoint.staging import companion_files, refuse_existing
from llada_jax.config import ModelConfig


def load_checkpoint(
    folder: str | os.PathLike[str],
    *,
    config: ModelConfig | None = None,
    dtype: Any = None,
    mesh: Mesh | None = None,
    progress: bool = False,
    check_finite: bool = True,
    quantization: str | None = None,
) -> tuple[ModelConfig, dict[str, Any]]:
    """``load_native`` or ``load_hf``, by what is in the folder; same arguments, same errors."""
    if is_native(folder):
        return load_native(
            folder,
            config=config,
            dtype=dtype,
            mesh=mesh,
            check_finite=check_finite,
            quantization=quantization,
        )
    return load_hf(
        folder,
        config=config,
        dtype=dtype,
        mesh=mesh,
        progress=progress,
        check_finite=check_finite,
        quantization=quantization,
    )


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    to: str = "hf",
    *,
    merged_experts: bool = False,
    dtype: Any = None,
    quantization: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    progress: bool = False,
) -> None:
    """Converts a checkpoint, in host memory, and copies its tokenizer files along.

    Args:
      src: a Hugging Face or a native checkpoint.
      dst: the folder to create.
      to: ``"hf"`` or ``"orbax"``.
      merged_experts: for ``"hf"``: one tensor for all experts of a layer.
      dtype: precision to convert the weights to (the router keeps its own); ``None`` keeps every
        tensor as it is, byte for byte.
      quantization: for ``"orbax"``: ``"int8"``, ``"fp8"`` or ``"int4"``; ``dtype`` is then that of
        the other weights.
      max_shard_bytes: for ``"hf"``: size of a file.
      progress: show bars.

    Raises:
      CheckpointError: as ``load_checkpoint``, ``save_hf`` and ``save_native``.
    """
    if to not in ("hf", "orbax"):
        raise CheckpointError(f"cannot convert to {to!r}; use 'hf' or 'orbax'")
    if merged_experts and to != "hf":
        raise CheckpointError("merged_experts is a Hugging Face layout; use to='hf'")
    if quantization is not None and to != "orbax":
        raise CheckpointError(
            f"the Hugging Face layout has no place for {quantization} weights; use to='orbax'"
        )
    if to == "hf" and (stored := stored_quantization(src)) is not None:
        raise CheckpointError(
            f"{src} holds {stored} weights, which the Hugging Face layout has no place for; "
            "convert the checkpoint that they were made from"
        )
    refuse_existing(Path(dst))
    with _on_the_host():
        config, params = load_checkpoint(
            src, dtype=dtype, progress=progress, quantization=quantization
        )
        raw = read_source_config(src)
        if dtype is not None:
            for key in ("dtype", "torch_dtype"):
                if key in raw:
                    raw[key] = np.dtype(dtype).name
        dtypes = stored_dtypes(src, config) if dtype is None else None
        files = companion_files(src)
        if to == "orbax":
            save_native(dst, config, params, source_config=raw, dtypes=dtypes, extra_files=files)
        else:
            save_hf(
                dst,
                config,
                params,
                source_config=raw,
                dtypes=dtypes,
                max_shard_bytes=max_shard_bytes,
                merged_experts=merged_experts,
                extra_files=files,
                progress=progress,
            )


def _on_the_host() -> contextlib.AbstractContextManager[Any]:
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX was told to leave the CPU out
        return contextlib.nullcontext()
