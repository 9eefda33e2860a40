"""Opening the model that a command names."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

from llada_jax.llm import BUILTIN_MODELS, LLM
from pallas_kernels.quantized import SCHEMES

DTYPES = ("auto", "bfloat16", "float32")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ``--model``, ``--revision``, ``--dtype``, ``--quantization`` and ``--kv-cache``."""
    parser.add_argument(
        "--model",
        metavar="M",
        help=f"a folder, a hub id, or a built-in model ({', '.join(BUILTIN_MODELS)}); "
        f"{BUILTIN_MODELS[0]} by default",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    add_dtype_argument(parser)
    add_quantization_argument(parser)
    parser.add_argument("--kv-cache", choices=("int8",), help="cached keys and values in 8 bits")


def add_dtype_argument(parser: argparse.ArgumentParser) -> None:
    """Adds ``--dtype``."""
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of weights and activations; auto is the checkpoint's own",
    )


def add_quantization_argument(
    parser: argparse.ArgumentParser,
    name: str = "--quantization",
    what: str = "quantise the weights while loading",
) -> None:
    """Adds ``--quantization``."""
    parser.add_argument(name, choices=SCHEMES, help=what)


def open_model(
    model: str | None,
    dtype: str = "auto",
    revision: str | None = None,
    quantization: str | None = None,
    kv_cache: str | None = None,
) -> LLM:
    """Loads a model; says so on a terminal.

    Raises:
      CheckpointError, TokenizerError, ChatError: if it cannot be used.
    """
    with Console(stderr=True).status(f"loading {model or BUILTIN_MODELS[0]}"):
        return LLM(
            model, dtype=dtype, quantization=quantization, revision=revision, kv_cache=kv_cache
        )


def on_terminal() -> bool:
    """Whether a person reads the standard output."""
    return sys.stdout.isatty()
