"""Convert a checkpoint between the Hugging Face layout and this library's own (orbax).

  llada-jax convert inclusionAI/LLaDA2.1-mini mini-orbax --to orbax
  llada-jax convert mini-orbax exported --to hf
  llada-jax convert inclusionAI/LLaDA2.1-mini mini-int8 --to orbax --quantize int8

Without --dtype and --quantize every tensor keeps its bytes. Tokenizer files go along.
"""

from __future__ import annotations

import argparse

from llada_jax.checkpoint import convert
from llada_jax.cli.models import add_quantization_argument, on_terminal
from llada_jax.cli.output import note
from llada_jax.llm import model_folder

_DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Source, destination, form."""
    parser.add_argument("src", metavar="SRC", help="a folder, a hub id, or a built-in model")
    parser.add_argument("dst", metavar="DST", help="the folder to create")
    parser.add_argument("--to", choices=("hf", "orbax"), required=True, help="the layout of DST")
    parser.add_argument(
        "--merged-experts",
        action="store_true",
        help="with --to hf: one tensor for all experts of a layer",
    )
    parser.add_argument("--dtype", choices=_DTYPES, help="store weights in this precision")
    add_quantization_argument(parser, "--quantize", "with --to orbax: quantise the weights")


def run(args: argparse.Namespace) -> int:
    """Converts."""
    convert(
        model_folder(args.src),
        args.dst,
        args.to,
        merged_experts=args.merged_experts,
        dtype=args.dtype,
        quantization=args.quantize,
        progress=on_terminal(),
    )
    note(f"wrote {args.dst}")
    return 0
