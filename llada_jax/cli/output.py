"""Printing results: text for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from typing import Any

from llada_jax.cli.models import on_terminal
from llada_jax.generation import Generation
from llada_jax.viz import escape_controls


def shown_text(generation: Generation, has_tokenizer: bool) -> str:
    """The result as printed: its text, or the ids of a model without a tokenizer."""
    if not has_tokenizer:
        return ",".join(map(str, generation.token_ids))
    return for_stdout(generation.text)


def for_stdout(text: str) -> str:
    """The text; on a terminal, without anything that the terminal would obey."""
    return escape_controls(text) if on_terminal() else text


def summary(generation: Generation) -> str:
    """One line of numbers."""
    return (
        f"{generation.num_tokens} tokens, {generation.num_forwards} forwards + "
        f"{generation.num_commit_forwards} commits, {generation.tokens_per_forward:.2f} tokens a "
        f"forward, {generation.num_edits} edits, ended by {generation.finish_reason}"
    )


def generation_json(generation: Generation) -> dict[str, Any]:
    """What ``generate --json`` prints for one prompt."""
    return {
        "text": generation.text,
        "token_ids": list(generation.token_ids),
        "num_tokens": generation.num_tokens,
        "num_forwards": generation.num_forwards,
        "num_commit_forwards": generation.num_commit_forwards,
        "num_edits": generation.num_edits,
        "tokens_per_forward": generation.tokens_per_forward,
        "finish_reason": generation.finish_reason,
        "confidences": list(generation.confidences),
    }


def print_json(value: Any) -> None:
    """One JSON value on one line, ASCII only."""
    print(json.dumps(value), flush=True)


def note(text: str) -> None:
    """Something beside the result: on the standard error."""
    print(text, file=sys.stderr, flush=True)
