"""Measure: `bench decode` the decoder beside the released code's loop, `bench load` an import,
`bench train` training steps and the memory of the loss.

llada-jax bench decode --json
llada-jax bench decode --batch 1 4 16 --prompt-length 128
llada-jax bench load --gigabytes 2
llada-jax bench train --rounds 2 --json
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from llada_jax.cli.output import print_json
from llada_jax.cli.parser import UsageError, positive_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure."""
    parser.add_argument("what", choices=("decode", "load", "train"))
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


def run(args: argparse.Namespace) -> int:
    """Measures and prints."""
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
