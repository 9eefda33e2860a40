"""Draw the curves of a training run, or of several to compare.

  llada-jax viz runs/sft
  llada-jax viz runs/a runs/b runs/c --out compared
  llada-jax viz runs/sft --format html --json

Writes curves.png (pip install "llada-jax[viz]") and curves.html, a page that needs no network.
"""

from __future__ import annotations

import argparse

from llada_jax.cli.output import print_json
from llada_jax.viz.curves import FORMATS, draw_curves, read_runs
from llada_jax.viz.panels import last_values


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Runs, and what to write where."""
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="a training folder, with metrics.jsonl in it"
    )
    parser.add_argument(
        "--out", metavar="FOLDER", help="where to write (default: RUN; for several, this folder)"
    )
    parser.add_argument(
        "--format", choices=(*FORMATS, "both"), default="both", help="what to write (default both)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the paths and the last values as JSON"
    )


def run(args: argparse.Namespace) -> int:
    """Draws."""
    runs = read_runs(args.runs)
    default = args.runs[0].removesuffix("metrics.jsonl") if len(args.runs) == 1 else "."
    formats = FORMATS if args.format == "both" else (args.format,)
    files = [str(file) for file in draw_curves(runs, args.out or default or ".", formats)]
    if args.json:
        last = {name: last_values(rows) for name, rows in runs.items()}
        print_json({"files": files, "runs": last})
    else:
        print("\n".join(files))
    return 0
