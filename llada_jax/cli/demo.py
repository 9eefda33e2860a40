"""Watch the built-in model count on: 2.0's decoding, then quality mode, then speed mode.

All three run 2.1's loop; they differ in two thresholds. 2.0 writes a token once and only when it
is nearly certain; quality mode drafts earlier and edits; speed mode drafts earliest.
"""

from __future__ import annotations

import argparse

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llada_jax.decoding import SamplingParams
from llada_jax.generation import Generation
from llada_jax.llm import LLM
from llada_jax.viz import escape_controls, replay

PROMPT = "17,18,19,20,"
NUM_TOKENS = 80


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
        llm = LLM()
    options = {"max_tokens": NUM_TOKENS, "return_trace": True}
    modes = {
        "2.0 (τ 0.95, no editing)": SamplingParams(
            threshold=0.95, editing_threshold=None, **options
        ),
        "quality": SamplingParams.quality(**options),
        "speed": SamplingParams.speed(**options),
    }
    rule = SamplingParams.v20(**options)
    with errors.status("compiling the decoder (some seconds, once a machine) and sampling"):
        *generations, by_rule = llm.generate([PROMPT] * 4, [*modes.values(), rule])
    results = dict(zip(modes, generations, strict=True))
    for name, generation in results.items():
        _show(console, llm, name, generation, args.delay)
    console.print(_table(results))
    same = all(g.token_ids == by_rule.token_ids for g in generations)
    console.print(
        f"SamplingParams.v20() itself (2.0's quota rule: a block ends with its last mask) needs "
        f"{by_rule.num_forwards} forwards + {by_rule.num_commit_forwards} commits for "
        f"{'the same' if same else 'other'} tokens."
    )
    return 0


def _show(console: Console, llm: LLM, name: str, generation: Generation, delay: float) -> None:
    assert generation.trace is not None  # it was asked for
    many = generation.num_forwards > 30
    console.print(Text(f"\n{name}", style="bold"))
    replay(
        generation.trace,
        llm.tokenizer,
        console,
        delay / 5 if many else delay,
        num_tokens=generation.num_tokens,
        title=name,
        every=8 if many else 1,
    )


def _table(results: dict[str, Generation]) -> Table:
    table = Table(
        title="\none model, three ways to decode it",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1),
    )
    table.add_column("mode")
    table.add_column("text", overflow="fold")
    for name in ("tokens", "forwards", "TPF", "edits", "commits"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, generation in results.items():
        table.add_row(
            name,
            Text(escape_controls(generation.text)),
            str(generation.num_tokens),
            str(generation.num_forwards),
            f"{generation.tokens_per_forward:.2f}",
            str(generation.num_edits),
            str(generation.num_commit_forwards),
        )
    return table
