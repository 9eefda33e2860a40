"""Average the weights of several checkpoints of one model.

  llada-jax merge mean runs/sft/best/step_000800 runs/sft/best/step_001000
  llada-jax merge mean early late --weights 1 3
  llada-jax merge --best 4 runs/sft mean

Checkpoints are in the Hugging Face layout or our own; the mean is written in the Hugging Face
layout, in the precision of the first and with its tokenizer. With --best the run comes first and
the new folder last.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llada_jax.cli.models import on_terminal
from llada_jax.cli.output import note, print_json
from llada_jax.cli.parser import UsageError, positive_int
from llada_jax.llm import model_folder
from llada_jax.training.merge import BEST_FOLDER, best_checkpoints, merge


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Folders, weights, or a run."""
    parser.add_argument("first", metavar="OUT", help="the folder to create (with --best: the run)")
    parser.add_argument(
        "rest",
        metavar="FOLDER",
        nargs="+",
        help="folders, hub ids or built-in models to average (with --best: the folder to create)",
    )
    parser.add_argument(
        "--weights", type=float, nargs="+", metavar="W", help="how much each counts (default: same)"
    )
    parser.add_argument(
        "--best",
        type=positive_int,
        metavar="K",
        help="merge the K checkpoints in RUN/best with the lowest validation loss",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Merges."""
    if args.best is None:
        out, folders = args.first, [str(model_folder(name)) for name in args.rest]
    else:
        out, folders = _best(args)
    merge(out, folders, weights=args.weights, progress=on_terminal())
    if args.json:
        print_json({"out": out, "merged": folders, "weights": args.weights})
    else:
        note(f"wrote {out}, the mean of {', '.join(folders)}")
    return 0


def _best(args: argparse.Namespace) -> tuple[str, list[str]]:
    if len(args.rest) != 1:
        raise UsageError("--best takes a run and the folder to create: merge --best K RUN OUT")
    (out,) = args.rest
    if not (Path(args.first) / BEST_FOLDER).is_dir() and (Path(out) / BEST_FOLDER).is_dir():
        raise UsageError(f"the run comes first: merge --best {args.best} {out} {args.first}")
    return out, [str(folder) for folder in best_checkpoints(args.first, args.best)]
