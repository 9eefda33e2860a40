"""Ask a model held-out problems: accuracy, tokens a forward, tokens a second, edits a token.

llada-jax eval --task all --mode speed
llada-jax eval --model FOLDER --task sudoku --difficulty 3 --n 500 --json
llada-jax eval --model FOLDER --quantization int8 --mode speed
llada-jax eval --model FOLDER --task editing --threshold 0.9 --editing-threshold off
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from llada_jax.cli.models import add_model_arguments
from llada_jax.cli.output import print_json
from llada_jax.cli.parser import UsageError, did_you_mean, positive_int
from llada_jax.cli.sampling_flags import (
    add_sampling_arguments,
    params_summary,
    parse_assignments,
    sampling_params,
)
from llada_jax.decoding import SamplingParams
from llada_jax.decoding.params import ALIASES
from llada_jax.eval import TaskResult, evaluate, mean_of
from llada_jax.llm import BUILTIN_MODELS, LLM
from llada_jax.tasks import DIFFICULTIES, TASKS, make_task

ALL = "all"
MAX_TOKENS = 128  # solutions are shorter; SamplingParams' own default would waste a cache


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Tasks, output, model and sampling."""
    parser.add_argument(
        "--task",
        action="append",
        metavar="NAME",
        help=f"{', '.join(TASKS)}, or {ALL} (the default); repeatable",
    )
    parser.add_argument(
        "--difficulty",
        type=int,
        choices=DIFFICULTIES,
        help="1 (easy) to 5 (hard); each task has a default",
    )
    parser.add_argument(
        "--n", type=positive_int, default=200, metavar="N", help="problems of each task (200)"
    )
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        default=16,
        metavar="N",
        help="problems decoded together, a power of two (16)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object a task, then their mean"
    )
    add_model_arguments(parser)
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluates and prints. ``--seed`` is the problems' too."""
    names = _task_names(args.task or [ALL])
    if args.batch_size & (args.batch_size - 1):
        raise UsageError(f"--batch-size {args.batch_size} must be a power of two, such as 16")
    params = _params(args)
    with Console(stderr=True).status(f"loading {args.model or BUILTIN_MODELS[0]}"):
        llm = LLM(
            args.model,
            dtype=args.dtype,
            quantization=args.quantization,
            kv_cache=args.kv_cache,
            revision=args.revision,
            max_batch_size=args.batch_size,
        )
    results = []
    for name in names:
        results.append(_evaluate(llm, name, params, args))
        if args.json:
            print_json(results[-1].to_json())
    if args.json and len(results) > 1:
        print_json(mean_of(results))
    if not args.json:
        _print(results, params)
    return 0


def _task_names(given: list[str]) -> list[str]:
    for name in given:
        if name not in (*TASKS, ALL):
            known = [*TASKS, ALL]
            hint = did_you_mean(name, known) or f"; known are {', '.join(known)}"
            raise UsageError(f"there is no task {name!r}{hint}")
    return list(TASKS) if ALL in given else list(dict.fromkeys(given))


def _params(args: argparse.Namespace) -> SamplingParams:
    """What the command line asks for, with this command's own default of ``max_tokens``."""
    assigned = {ALIASES.get(name, name) for name in parse_assignments(args.assignments)[1]}
    is_set = hasattr(args, "sampling_max_tokens") or "max_tokens" in assigned
    return sampling_params(args, **({} if is_set else {"max_tokens": MAX_TOKENS}))


def _evaluate(llm: LLM, name: str, params: SamplingParams, args: argparse.Namespace) -> TaskResult:
    """Evaluates one task, with a bar on a terminal."""
    task = make_task(name, args.difficulty)
    console = Console(stderr=True)
    with Progress(console=console, disable=not sys.stderr.isatty(), transient=True) as bar:
        progress = bar.add_task(name, total=args.n)
        return evaluate(
            llm,
            task,
            args.n,
            params,
            seed=params.seed or 0,
            report=lambda problem, generation, score: bar.advance(progress),
        )


def _print(results: list[TaskResult], params: SamplingParams) -> None:
    table = Table(title=f"{results[0].device}: {params_summary(params)}", title_justify="left")
    columns = ("task", "level", "n", "accuracy", "tokens/\nforward", "tokens/s", "edits/\ntoken")
    for column in columns:
        table.add_column(column, justify="left" if column == "task" else "right", no_wrap=True)
    rows: list[dict[str, Any]] = [result.to_json() for result in results]
    if len(rows) > 1:
        rows.append(mean_of(results))
    for row in rows:
        if row["task"] == "mean":
            table.add_section()
        table.add_row(
            row["task"],
            str(row.get("difficulty", "")),
            str(row["n"]),
            f"{100 * row['accuracy']:.1f} ± {100 * row['stderr']:.1f} %",
            f"{row['tokens_per_forward']:.2f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['edits_per_token']:.3f}",
        )
    Console(highlight=False).print(table)
