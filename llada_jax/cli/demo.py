"""Watch the built-in model solve a problem: 2.0's decoding, then quality mode, then speed mode.

All three run 2.1's loop; they differ in two thresholds. 2.0's (0.95, no editing) write a token once
and only when it is nearly certain; quality mode drafts earlier and edits; speed mode drafts
earliest.
"""

from __future__ import annotations

import argparse

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llada_jax.decoding import SamplingParams
from llada_jax.eval import held_out_problems
from llada_jax.generation import Generation
from llada_jax.llm import LLM
from llada_jax.tasks import make_task
from llada_jax.viz import escape_controls, replay

PROBLEMS = {"addition": 7, "sudoku": 3, "countdown": 8}  # tasks, and which held-out problem of each
MAX_TOKENS = 96


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The speed of the show."""
    parser.add_argument(
        "--delay",
        type=float,
        default=0.25,
        metavar="S",
        help="seconds a forward pass stays on the screen (2.0's: a fifth of that)",
    )


def run(args: argparse.Namespace) -> int:
    """Samples, replays the steps, prints a table."""
    console = Console(highlight=False)
    errors = Console(stderr=True)
    with errors.status("loading the built-in model"):
        llm = LLM("nano")
    options = {"max_tokens": MAX_TOKENS, "return_trace": True}
    modes = {
        "0.95, no editing": SamplingParams(threshold=0.95, editing_threshold=None, **options),
        "quality": SamplingParams.quality(**options),
        "speed": SamplingParams.speed(**options),
    }
    tasks = {name: make_task(name) for name in PROBLEMS}
    problems = {name: held_out_problems(tasks[name], n + 1)[n] for name, n in PROBLEMS.items()}
    with errors.status("compiling the decoder (some seconds, once a machine) and sampling"):
        conversations = [problem.messages[:1] for problem in problems.values() for _ in modes]
        generations = iter(llm.chat(conversations, [*modes.values()] * len(problems)))
    solved = {name: {mode: next(generations) for mode in modes} for name in problems}
    first = next(iter(problems))
    for mode in modes:
        console.print(Text(f"\n{mode}: {problems[first].prompt}", style="bold"))
        _replay(console, llm, mode, solved[first][mode], args.delay)
    table = _table()
    for name, problem in problems.items():
        for i, (mode, generation) in enumerate(solved[name].items()):
            asked = problem.prompt if i == 0 else ""
            right = tasks[name].score(problem, generation.text) == 1
            _add_row(table, asked, mode, generation, right, last=i == len(modes) - 1)
    console.print(table)
    return 0


def _replay(console: Console, llm: LLM, name: str, generation: Generation, delay: float) -> None:
    assert generation.trace is not None  # it was asked for
    many = generation.num_forwards > 30
    replay(
        generation.trace,
        llm.tokenizer,
        console,
        delay / 5 if many else delay,
        num_tokens=generation.num_tokens,
        title=name,
        every=8 if many else 1,
    )


def _table() -> Table:
    table = Table(
        title="\none model, three ways to decode it; problems that training never showed",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1),
    )
    table.add_column("problem", overflow="fold")
    table.add_column("mode")
    table.add_column("answer", overflow="fold")
    for name in ("right", "tokens", "forwards", "TPF", "edits"):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _add_row(
    table: Table, problem: str, mode: str, generation: Generation, right: bool, *, last: bool
) -> None:
    table.add_row(
        Text(escape_controls(problem)),
        mode,
        Text(escape_controls(generation.text.replace("\n", " "))),
        "yes" if right else "no",
        str(generation.num_tokens),
        str(generation.num_forwards),
        f"{generation.tokens_per_forward:.2f}",
        str(generation.num_edits),
        end_section=last,
    )
