"""Talk with a model. A line is a turn; these lines are commands:

  /mode speed|quality|v20    switch the decoding mode
  /set field=value ...       set fields of SamplingParams (max_tokens=256 editing_threshold=off)
  /reset                     forget the conversation
  /quit                      leave (so does the end of the input)

Ctrl-C stops an answer; at the prompt it leaves.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from typing import Any

from llada_jax.cli.app import error_line
from llada_jax.cli.models import add_model_arguments, open_model
from llada_jax.cli.output import for_stdout, note, summary
from llada_jax.cli.parser import UsageError
from llada_jax.cli.sampling_flags import (
    MODES,
    add_sampling_arguments,
    params_summary,
    parse_assignments,
    sampling_params,
)
from llada_jax.decoding import SamplingParams
from llada_jax.decoding.params import resolve_aliases
from llada_jax.generation import Generation
from llada_jax.llm import LLM

_DECIDED_BY_MODE = ("threshold", "editing_threshold", "steps")  # /mode leaves the rest alone


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, system message, sampling."""
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    add_model_arguments(parser)
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Reads turns until the input ends."""
    params = sampling_params(args)
    llm = open_model(args.model, args.dtype, args.revision, args.quantization, args.kv_cache)
    chat = Chat(llm, params, args.system)
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() a history)
        note("/mode, /set, /reset, /quit; see `llada-jax chat --help`")
    while True:
        try:
            line = input("> " if interactive else "")
        except EOFError:
            return 0
        if line.strip() in ("/quit", "/exit"):
            return 0
        if not line.strip():
            continue
        try:
            if line.startswith("/"):
                note(chat.command(line))
            else:
                note(summary(chat.turn(line)))
        except ValueError as error:
            reason = error_line(error)
            if reason is None:
                raise
            note(reason)
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()
            note("stopped; the turn is forgotten")


class Chat:
    """One conversation.

    Args:
      llm: a model with a chat template.
      params: how to answer.
      system: the system message.

    Raises:
      ChatError: if the model has no chat template.
    """

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None = None):
        self.llm = llm
        self.params = params
        self._opening = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, Any]] = list(self._opening)
        if llm.chat_template is None:
            llm.render_chat([{"role": "user", "content": ""}])  # raises, and says why

    def turn(self, text: str) -> Generation:
        """Answers, printing the answer as it becomes final.

        The conversation goes on only if the answer was completed.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        generation = None
        for event in self.llm.stream(self.llm.render_chat(messages), self.params):
            print(for_stdout(event.text), end="", flush=True)
            generation = event.generation
        print(flush=True)
        assert generation is not None  # a stream ends with its generation
        self.messages = [*messages, {"role": "assistant", "content": generation.text}]
        return generation

    def command(self, line: str) -> str:
        """Obeys a line that begins with a slash.

        Returns:
          What to tell the user.

        Raises:
          UsageError: for an unknown command.
          SamplingError: for a field or value that does not exist.
        """
        name, *words = line.split()
        if name == "/reset" and not words:
            self.messages = list(self._opening)
            return "the conversation is empty"
        if name == "/mode" and len(words) == 1:
            words = [f"mode={words[0]}"]
        elif name != "/set" or not words:
            raise UsageError(
                f"{line.strip()!r} is no command; use /mode {'|'.join(MODES)}, /set field=value, "
                "/reset or /quit"
            )
        self._set(words)
        return params_summary(self.params)

    def _set(self, assignments: list[str]) -> None:
        mode, given = parse_assignments(assignments)
        fields = resolve_aliases(given)
        if mode is None:
            self.params = dataclasses.replace(self.params, **fields)
            return
        kept = {name: v for name, v in vars(self.params).items() if name not in _DECIDED_BY_MODE}
        self.params = SamplingParams.from_mode(mode, **(kept | fields))
