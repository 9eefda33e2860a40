"""Measure: `bench decode` the decoder beside the released code's loop, `bench load` an import.

llada-jax bench decode --json
llada-jax bench decode --batch 1 4 16 --prompt-length 128
llada-jax bench load --gigabytes 2
"""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console
from rich.table import Table

from llada_jax.cli.output import print_json
from llada_jax.cli.parser import UsageError, positive_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure."""
    parser.add_argument("what", choices=("decode", "load"))
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
        default=[1, 8],
        metavar="N",
        help="prompts decoded together (1 8)",
    )
    load = parser.add_argument_group("bench load")
    load.add_argument(
        "--gigabytes", type=float, default=2.0, metavar="X", help="size of the checkpoint (2)"
    )


def run(args: argparse.Namespace) -> int:
    """Measures and prints."""
    measured = _decode(args) if args.what == "decode" else _load(args)
    if args.json:
        print_json(measured)
    elif args.what == "decode":
        _print_decode(measured)
    else:
        _print_load(measured)
    return 0


def _decode(args: argparse.Namespace) -> dict[str, Any]:
    from llada_jax.bench.decode import bench_decode

    with Console(stderr=True).status("") as status:
        return bench_decode(
            args.prompt_length,
            args.new_tokens,
            tuple(dict.fromkeys(args.batch)),
            args.width,
            args.repeats,
            report=status.update,
        )


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


def _print_load(measured: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None)
    for name, value in measured.items():
        if name.endswith("bytes"):
            name, shown = name.removesuffix("_bytes"), f"{value / 1e9:.2f} GB"
        else:
            shown = f"{value:.2f}"
        table.add_row(name.replace("_", " "), shown)
    Console(highlight=False).print(table)
