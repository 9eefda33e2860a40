"""Finds the command, runs it, and turns what users can cause into one line."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from llada_jax.cli.parser import Parser, UsageError, did_you_mean

DEBUG_VARIABLE = "LLADA_JAX_DEBUG"

# A module of this name holds the command: add_arguments(parser), run(args) -> exit code.
COMMANDS = {
    "generate": "continue prompts",
    "chat": "talk with a model",
    "demo": "watch the built-in model fill and edit its draft, in three modes",
    "info": "what a configuration describes: sizes and parameter counts",
    "convert": "convert a checkpoint between the Hugging Face and orbax layouts",
    "verify": "how far two models agree on the same tokens",
    "merge": "average the weights of several checkpoints",
    "viz": "draw the curves of training runs",
    "eval": "solve generated problems: accuracy and speed",
    "train": "pre-train or fine-tune; the same command resumes",
    "bench": "measure decoding, training or loading",
}

_INTERRUPTED = 130
_BROKEN_PIPE = 141  # what a shell reports for a program that SIGPIPE ended


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``llada-jax`` with ``argv`` (the process's own by default).

    Returns:
      The exit code: 0, 1 (``verify``: too far apart), 2 (an error, reported in one line on the
      standard error), 130 (interrupted), 141 (nobody reads the output any more).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # text beyond the terminal's encoding must not crash
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except SystemExit as end:  # argparse's --help
        return end.code if isinstance(end.code, int) else 0
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):  # nothing must be flushed at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except Exception as error:
        line = error_line(error)
        if line is None or os.environ.get(DEBUG_VARIABLE, "0") != "0":
            raise
        print(line, file=sys.stderr)
        return 2


def run_process() -> NoReturn:
    """The console script: ``main`` for a process of its own."""
    code = main()
    if code == _INTERRUPTED:
        # A compilation may still be running in XLA's threads; taking the interpreter down under it
        # would crash.
        print("llada-jax: interrupted", file=sys.stderr, flush=True)
        os._exit(code)
    sys.exit(code)


def error_line(error: Exception) -> str | None:
    """What to tell the user about an error, in one line; ``None`` for a defect of the program."""
    reason = _reason(error)
    if reason is None:
        return None
    words = " ".join(reason.split())
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
    return f"llada-jax: error: {safe}"


def _dispatch(arguments: list[str]) -> int:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        print(_help())
        return 0
    if name == "--version":
        from llada_jax import __version__

        print(f"llada-jax {__version__}")
        return 0
    if name not in COMMANDS:
        raise UsageError(
            f"unknown command {name!r}{did_you_mean(name, list(COMMANDS))}; see `llada-jax --help`"
        )
    module = importlib.import_module(f"llada_jax.cli.{name}")
    parser = Parser(f"llada-jax {name}", module.__doc__)
    module.add_arguments(parser)
    return module.run(parser.parse(arguments[1:]))


def _help() -> str:
    commands = "\n".join(f"  {name:10}{what}" for name, what in COMMANDS.items())
    return f"""usage: llada-jax COMMAND ...

LLaDA2.x block-diffusion language models in JAX.

commands:
{commands}

llada-jax COMMAND --help says more. {DEBUG_VARIABLE}=1 shows tracebacks."""


def _reason(error: Exception) -> str | None:
    text = str(error)
    if isinstance(error, ValueError) and type(error).__module__.startswith("llada_jax"):
        return text
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        first = text.splitlines()[0] if text else "not enough memory"
        return (
            f"out of memory ({first}); use fewer prompts at once, shorter ones, or bfloat16; in "
            "training a smaller train.micro_batch_size, or train.remat=full"
        )
    if isinstance(error, RuntimeError) and "Unable to initialize backend" in text:
        return f"{text.splitlines()[0]}; check JAX_PLATFORMS"
    return None
