"""Measure: `bench decode` the decoder beside the released code's loop, `bench load` an import,
`bench train` training steps and the memory of the loss. `bench roofline` measures nothing: it
adds up the least time of a decoding forward on each TPU.

llada-jax bench decode --json
llada-jax bench decode --batch 1 4 16 --prompt-length 128
llada-jax bench load --gigabytes 2
llada-jax bench train --rounds 2 --json
llada-jax bench roofline --shape mini flash --json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llada_jax.cli.output import print_json
from llada_jax.cli.parser import UsageError, positive_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure."""
    parser.add_argument("what", choices=("decode", "load", "train", "roofline"))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    decode = parser.add_argument_group("bench decode")
    for name, default, text in (
        ("--prompt-length", 512, "tokens of each prompt"),
        ("--new-tokens", 256, "tokens to generate for each"),
        ("--width", 4, "factor on the widths of the counting model"),
        ("--repeats", 3, "the median of so many runs is reported"),
    ):
        decode.add_argument(
            name, type=positive_int, default=default, metavar="N", help=f"{text} ({default})"
        )
    decode.add_argument(
        "--batch",
        type=positive_int,
        nargs="+",
        metavar="N",
        help="prompts decoded together (1 8; bench roofline 1 8 32)",
    )
    train = parser.add_argument_group("bench train")
    train.add_argument("--config", default="nano", help="the model's shape (nano)")
    for name, default, text in (
        ("--rows", 32, "rows a step"),
        ("--length", 64, "tokens a row"),
        ("--rounds", 2, "rounds of the multi-turn forward"),
        ("--steps", 5, "steps to time; the median is reported"),
    ):
        train.add_argument(
            name, type=positive_int, default=default, metavar="N", help=f"{text} ({default})"
        )
    train.add_argument("--bfloat16", action="store_true", help="mixed precision")
    load = parser.add_argument_group("bench load")
    load.add_argument(
        "--gigabytes", type=float, default=2.0, metavar="X", help="size of the checkpoint (2)"
    )
    roofline = parser.add_argument_group("bench roofline")
    roofline.add_argument(
        "--shape", nargs="+", default=["mini"], metavar="MODEL", help="models (mini)"
    )
    roofline.add_argument(
        "--cache-length",
        type=positive_int,
        default=1024,
        metavar="N",
        help="cached positions a row (1024)",
    )
    roofline.add_argument(
        "--kernels",
        type=Path,
        metavar="FILE",
        help="the kernels' bundles as time: docs/kernels.json, or another of "
        "`python -m pallas_kernels.report --json --rows 1 8 32 --weights bfloat16 int8 fp8 int4`",
    )
    roofline.add_argument("--markdown", action="store_true", help="print a Markdown table")


def run(args: argparse.Namespace) -> int:
    """Measures and prints."""
    if args.what == "roofline":
        return _roofline(args)
    measured = {"decode": _decode, "load": _load, "train": _train}[args.what](args)
    if args.json:
        print_json(measured)
    elif args.what == "decode":
        _print_decode(measured)
    else:
        _print_values(measured)
    return 0


def _decode(args: argparse.Namespace) -> dict[str, Any]:
    from llada_jax.bench.decode import bench_decode

    with Console(stderr=True).status("") as status:
        return bench_decode(
            args.prompt_length,
            args.new_tokens,
            tuple(dict.fromkeys(args.batch or [1, 8])),
            args.width,
            args.repeats,
            report=status.update,
        )


def _roofline(args: argparse.Namespace) -> int:
    from llada_jax.bench.roofline import bench_roofline

    kernels: Any = ()
    if args.kernels:
        try:
            kernels = json.loads(args.kernels.read_text())
        except ValueError as error:
            raise UsageError(f"--kernels {args.kernels} is not JSON: {error}") from error
    if args.kernels and not (isinstance(kernels, list) and any("rows" in c for c in kernels)):
        raise UsageError(
            f"--kernels {args.kernels} holds no calls: make it by `python -m "
            "pallas_kernels.report --json --rows 1 8 32 --weights bfloat16 int8 fp8 int4`"
        )
    batches = tuple(dict.fromkeys(args.batch or [1, 8, 32]))
    rows = [
        row
        for model in args.shape
        for row in bench_roofline(model, batches, cache_length=args.cache_length, kernels=kernels)
    ]
    if args.json:
        print_json(rows)
        return 0
    header, lines = _roofline_cells(rows)
    if args.markdown:
        for line in (header, ["---", *["---:"] * (len(header) - 1)], *lines):
            print(f"| {' | '.join(line)} |")
        return 0
    title = f"limits at {args.cache_length} cached positions a row"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1))
    for name in header:
        table.add_column(name, justify="right" if name != "chip" else "left", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    Console(highlight=False).print(table)
    return 0


def _roofline_cells(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The limits as text; models are named where there are several."""
    header = ["chip", "weights", "rows", "GB", "GFLOP", "bound", "fwd/s", "tok/s S", "tok/s Q"]
    header.append("fits")
    compiled = any(row["compiler"] for row in rows)
    if compiled:
        header += ["kernels ms", "issue ms", "fwd/s by kernels", "bound by kernels"]
    several = len({row["model"] for row in rows}) > 1
    lines = []
    for row in rows:
        sums = row["arithmetic"]
        speeds = sums["tokens_per_second"]
        chip = f"{row['chip']} {row['model']}" if several else row["chip"]
        lines.append(
            [
                chip,
                row["weights"],
                str(row["batch"]),
                f"{sums['bytes'] / 1e9:.1f}",
                f"{sums['flops'] / 1e9:.0f}",
                sums["bound"],
                f"{sums['forwards_per_second']:.0f}",
                *(f"{speeds[m]:.0f}" if m in speeds else "" for m in ("speed", "quality")),
                "yes" if sums["fits"] else "no",
                *(_kernel_cells(row["compiler"]) if compiled else ()),
            ]
        )
    return header, lines


def _kernel_cells(compiled: dict[str, Any] | None) -> list[str]:
    if compiled is None:
        return [""] * 4
    return [
        f"{1e3 * compiled['kernel_seconds']:.1f}",
        f"{1e3 * compiled['issue_seconds']:.1f}",
        f"{compiled['forwards_per_second']:.0f}",
        compiled["bound"],
    ]


def _load(args: argparse.Namespace) -> dict[str, Any]:
    from llada_jax.bench.load import bench_load

    if not 0 < args.gigabytes < float("inf"):
        raise UsageError(f"--gigabytes {args.gigabytes} must be a positive number")
    with Console(stderr=True).status(f"writing and importing {args.gigabytes:g} GB"):
        return bench_load(args.gigabytes)


def _print_decode(measured: dict[str, Any]) -> None:
    table = Table(
        title=f"{measured['device']}: prompt {measured['prompt_length']}, "
        f"{measured['new_tokens']} new tokens",
        title_justify="left",
    )
    for name in ("", "tokens/s", "forwards/s", "tokens a forward", "speed-up"):
        table.add_column(name, justify="right" if name else "left")
    reference = measured["reference"]
    table.add_row(
        "reference loop",
        f"{reference['tokens_per_second']:.1f}",
        f"{reference['forwards_per_second']:.1f}",
        "",
        "1.0x",
    )
    for batch, row in measured["batch"].items():
        table.add_row(
            f"batch {batch}",
            f"{row['tokens_per_second']:.1f}",
            f"{row['forwards_per_second']:.1f}",
            f"{row['tokens_per_forward']:.2f}",
            f"{row['speedup_vs_reference_loop']:.1f}x",
        )
    Console(highlight=False).print(table)


def _train(args: argparse.Namespace) -> dict[str, Any]:
    from llada_jax.bench.train import bench_train

    with Console(stderr=True).status("") as status:
        return bench_train(
            args.config,
            args.rows,
            args.length,
            args.rounds,
            args.steps,
            mixed_precision=args.bfloat16,
            report=status.update,
        )


def _print_values(measured: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None)
    for name, value in _flattened(measured):
        if name.endswith("bytes"):
            name, shown = name.removesuffix("_bytes"), f"{value / 1e9:.2f} GB"
        elif name == "mfu":
            shown = f"{100 * value:.1f} %"
        elif isinstance(value, float):
            shown = f"{value:.2f}" if value < 1e4 else f"{value:.3g}"
        else:
            shown = str(value)
        table.add_row(name.replace("_", " "), shown)
    Console(highlight=False).print(table)


def _flattened(measured: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in measured.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{name} ")
        else:
            yield prefix + name, value
