"""Continue prompts. The text goes to the standard output, numbers to the standard error.

llada-jax generate "17,18,19,20," --mode speed --max-tokens 80
llada-jax generate --model inclusionAI/LLaDA2.1-mini "Write quicksort." --watch
llada-jax generate --prompt-file prompts.txt --json --set editing_threshold=off
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from llada_jax.cli.models import add_model_arguments, on_terminal, open_model
from llada_jax.cli.output import (
    for_stdout,
    generation_json,
    note,
    print_json,
    shown_text,
    summary,
)
from llada_jax.cli.parser import UsageError, token_ids
from llada_jax.cli.sampling_flags import add_sampling_arguments, is_assignment, sampling_params
from llada_jax.decoding import SamplingParams
from llada_jax.generation import Generation
from llada_jax.llm import LLM
from llada_jax.viz import watch, write_traces

Prompts = list[str] | list[list[int]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Prompts, output, model and sampling."""
    parser.add_argument(
        "prompts",
        nargs="*",
        metavar="PROMPT",
        help="text; the standard input if there is none. decode=MODE and FIELD=VALUE set what "
        "--mode and --set do",
    )
    parser.add_argument("--prompt-file", metavar="F", type=Path, help="a file, a prompt a line")
    parser.add_argument(
        "--token-ids",
        action="append",
        type=token_ids,
        metavar="1,2,3",
        help="a prompt as token ids; repeatable",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a prompt")
    parser.add_argument("--watch", action="store_true", help="show every forward pass")
    parser.add_argument("--trace", metavar="FILE.json", type=Path, help="record every forward pass")
    add_model_arguments(parser)
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Samples and prints."""
    args.assignments += [word for word in args.prompts if is_assignment(word)]
    args.prompts = [word for word in args.prompts if not is_assignment(word)]
    params = sampling_params(args, return_trace=args.trace is not None)
    if args.trace is not None and not args.trace.absolute().parent.is_dir():
        raise UsageError(f"--trace {args.trace}: its folder does not exist; create it first")
    prompts = _prompts(args)
    llm = open_model(args.model, args.dtype, args.revision, args.quantization, args.kv_cache)
    generations = _sample(llm, prompts, params, args)
    if args.trace is not None:
        write_traces(args.trace, generations, _token_texts(llm, generations))
    return 0


def _prompts(args: argparse.Namespace) -> Prompts:
    texts = list(args.prompts)
    if args.prompt_file is not None:
        lines = _read_text(args.prompt_file).splitlines()
        texts += [line for line in lines if line.strip()]
        if not texts:
            raise UsageError(f"{args.prompt_file} holds no prompt; write one a line")
    if args.token_ids:
        if texts:
            raise UsageError("--token-ids cannot be combined with prompts of text; run them apart")
        return args.token_ids
    if texts:
        return texts
    if sys.stdin.isatty():
        raise UsageError(
            "there is no prompt; give one, or --prompt-file, or --token-ids, or pipe one in"
        )
    return [sys.stdin.read().removesuffix("\n")]


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8 text: {error}") from error


def _sample(
    llm: LLM, prompts: Prompts, params: SamplingParams, args: argparse.Namespace
) -> list[Generation]:
    """Samples and prints in the form asked for, as soon as possible."""
    if args.watch:
        generations = []
        for prompt in prompts:
            generation = watch(llm, prompt, params, Console(stderr=args.json or not on_terminal()))
            if args.json or not on_terminal():
                _print(llm, generation, args.json)
            note(summary(generation))
            generations.append(generation)
        return generations
    if len(prompts) == 1 and on_terminal() and not args.json and llm.tokenizer is not None:
        generation = _stream(llm, prompts[0], params)
        note(summary(generation))
        return [generation]
    generations = llm.generate(prompts, params, progress=on_terminal() and not args.json)
    for number, generation in enumerate(generations, start=1):
        if len(prompts) > 1 and not args.json:
            note(f"[{number}/{len(prompts)}] {summary(generation)}")
        _print(llm, generation, args.json)
    if len(prompts) == 1 and not args.json:
        note(summary(generations[0]))
    return generations


def _stream(llm: LLM, prompt: str | list[int], params: SamplingParams) -> Generation:
    generation = None
    for event in llm.stream(prompt, params):
        print(for_stdout(event.text), end="", flush=True)
        generation = event.generation
    print()
    assert generation is not None  # a stream ends with its generation
    return generation


def _print(llm: LLM, generation: Generation, as_json: bool) -> None:
    if as_json:
        print_json(generation_json(generation))
    else:
        print(shown_text(generation, llm.tokenizer is not None), flush=True)


def _token_texts(llm: LLM, generations: list[Generation]) -> dict[int, str]:
    """How every token appears that the recordings mention."""
    if llm.tokenizer is None:
        return {}
    seen: set[int] = set()
    for generation in generations:
        seen.update(generation.prompt_token_ids, generation.token_ids)
        for step in generation.trace.steps if generation.trace is not None else ():
            seen.update(step.before.tolist(), step.after.tolist(), step.proposal.tolist())
    return {token: llm.tokenizer.token_text(token) for token in sorted(seen)}
