"""Convert a checkpoint between the Hugging Face layout and this library's own (orbax).

  llada-jax convert inclusionAI/LLaDA2.1-mini mini-orbax --to orbax
  llada-jax convert mini-orbax exported --to hf

Without --dtype every tensor keeps its bytes. Tokenizer files go along.
"""

from __future__ import annotations

import argparse

from llada_jax.checkpoint import convert
from llada_jax.cli.models import on_terminal
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


def run(args: argparse.Namespace) -> int:
    """Converts."""
    convert(
        model_folder(args.src),
        args.dst,
        args.to,
        merged_experts=args.merged_experts,
        dtype=args.dtype,
        progress=on_terminal(),
    )
    note(f"wrote {args.dst}")
    return 0
