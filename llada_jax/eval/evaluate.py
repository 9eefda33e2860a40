"""Asks a model held-out problems of a task, in batches, and scores what it writes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import jax
import numpy as np

from llada_jax.decoding import SamplingParams
from llada_jax.eval.result import TaskResult
from llada_jax.generation import Generation
from llada_jax.llm import LLM
from llada_jax.request import bucket
from llada_jax.tasks import Problem, Task

_MAX_REPEATS = 300  # draws in a row of problems already seen, before the split counts as exhausted

Report = Callable[[Problem, Generation, float], None]


class EvalError(ValueError):
    """An evaluation that cannot be made; the message says what to do instead."""


def evaluate(
    llm: LLM,
    task: Task,
    n: int = 200,
    params: SamplingParams | None = None,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    report: Report | None = None,
) -> TaskResult:
    """Measures accuracy and speed on problems that training never shows (``split="test"``).

    A batch of conversations is decoded together, and conversations of alike length share one. The
    time excludes compilation: before the first batch of each shape, a short one warms it up.

    Args:
      llm: the model, with a chat template.
      task: what to ask.
      n: how many different problems; fewer are asked if the test split holds fewer.
      params: how to decode; quality mode by default.
      seed: of the problems, and of the draws if ``params`` names none. The same seed asks the same
        problems of every model.
      batch_size: conversations decoded together, ``llm.max_batch_size`` by default and at most.
      report: is told each problem, what the model made of it and the score, as they come.

    Returns:
      The result; its scores are in the order of ``held_out_problems``.

    Raises:
      EvalError: if ``n`` or ``batch_size`` is less than 1.
      ChatError: if the model has no chat template.
      PromptError: if a conversation does not fit into the model's context.
    """
    batch_size = llm.max_batch_size if batch_size is None else batch_size
    if n < 1 or batch_size < 1:
        raise EvalError(f"n = {n} and batch_size = {batch_size} must be at least 1")
    batch_size = min(batch_size, llm.max_batch_size)
    params = params or SamplingParams()
    problems = held_out_problems(task, n, seed)
    prompts = [llm.render_chat(problem.messages[:1]) for problem in problems]
    order = sorted(range(len(problems)), key=lambda i: _length(llm, prompts[i]))
    scores = [0.0] * len(problems)
    generations: list[Generation] = []
    seconds, warm = 0.0, set()
    for first in range(0, len(order), batch_size):
        places = order[first : first + batch_size]
        batch = [prompts[i] for i in places]
        each = [_with_seed(params, seed, i) for i in places]
        shape = _shape(llm, batch, params)
        if shape not in warm:
            llm.generate(batch, [_hasty(one) for one in each])
            warm.add(shape)
        start = time.perf_counter()
        written = llm.generate(batch, each)
        seconds += time.perf_counter() - start
        generations += written
        for i, generation in zip(places, written, strict=True):
            scores[i] = task.score(problems[i], generation.text)
            if report is not None:
                report(problems[i], generation, scores[i])
    return TaskResult(
        task=task.name,
        difficulty=task.difficulty,
        scores=tuple(scores),
        num_tokens=sum(generation.num_tokens for generation in generations),
        num_forwards=sum(generation.num_forwards for generation in generations),
        num_edits=sum(generation.num_edits for generation in generations),
        num_stopped=sum(generation.finish_reason == "stop" for generation in generations),
        seconds=seconds,
        device=jax.devices()[0].device_kind,
    )


def held_out_problems(task: Task, n: int, seed: int = 0) -> list[Problem]:
    """Different problems of the test split; fewer than ``n`` if it is exhausted.

    Args:
      task: the kind of problem.
      n: how many at most.
      seed: the same seed gives the same problems; a larger ``n`` adds to them.

    Returns:
      The problems.
    """
    rng = np.random.default_rng(seed)
    found: dict[str, Problem] = {}
    repeats = 0
    while len(found) < n and repeats < _MAX_REPEATS:
        problem = task.sample(rng, "test")
        repeats = repeats + 1 if problem.prompt in found else 0
        found.setdefault(problem.prompt, problem)
    return list(found.values())


def _length(llm: LLM, prompt: str) -> int:
    """Tokens of a prompt (characters without a tokenizer: ``generate`` refuses it later)."""
    return len(prompt if llm.tokenizer is None else llm.tokenizer.encode(prompt))


def _shape(llm: LLM, prompts: list[str], params: SamplingParams) -> tuple[int, int]:
    """What decides the compiled program: rows and blocks, as ``make_batch`` rounds them."""
    end = max(_length(llm, prompt) for prompt in prompts) + params.max_tokens
    return 1 << (len(prompts) - 1).bit_length(), bucket(-(-end // params.block_length))


def _with_seed(params: SamplingParams, seed: int, place: int) -> SamplingParams:
    """Parameters with draws of their own for one problem, the same in every run."""
    first = seed if params.seed is None else params.seed
    return dataclasses.replace(params, seed=(first + place) % 2**32)


def _hasty(params: SamplingParams) -> SamplingParams:
    """The same compiled program with as few forwards as it can do: for warming up."""
    return dataclasses.replace(params, threshold=0.0, steps=None, max_post_steps=0)
