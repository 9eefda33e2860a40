"""Checkpoints: Hugging Face safetensors in and out, our own orbax folders, the hub, comparison."""

from llada_jax.checkpoint.convert import convert, load_checkpoint
from llada_jax.checkpoint.errors import CheckpointError
from llada_jax.checkpoint.folder import read_config, read_source_config
from llada_jax.checkpoint.hf import load_hf, save_hf
from llada_jax.checkpoint.hub import resolve_model
from llada_jax.checkpoint.keys import hf_names
from llada_jax.checkpoint.native import (
    is_native,
    load_native,
    save_native,
    stored_dtypes,
    stored_quantization,
)
from llada_jax.checkpoint.staging import COMPANION_FILES, companion_files
from llada_jax.checkpoint.verify import Agreement, compare, kl_divergence, layer_drift

__all__ = [
    "COMPANION_FILES",
    "Agreement",
    "CheckpointError",
    "companion_files",
    "compare",
    "convert",
    "hf_names",
    "is_native",
    "kl_divergence",
    "layer_drift",
    "load_checkpoint",
    "load_hf",
    "load_native",
    "read_config",
    "read_source_config",
    "resolve_model",
    "save_hf",
    "save_native",
    "stored_dtypes",
    "stored_quantization",
]
