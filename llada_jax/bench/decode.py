"""How fast the compiled, cached decoder is, beside the loop of the released code.

Both decode the same prompts with the same weights in the same run, and must write the same tokens.
Compilation is excluded for both; the two take turns, so that other load on the machine hits both.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from llada_jax.bench.reference_loop import ReferenceLoop
from llada_jax.compilation_cache import enable_compilation_cache
from llada_jax.config import ModelConfig
from llada_jax.decoding import Decoder, DecodeResult, ModelDenoiser, RowSettings, SamplingParams
from llada_jax.model import LLaDA2, count_parameters
from llada_jax.request import Request, make_batch

SAMPLING = SamplingParams(
    threshold=0.5, editing_threshold=0.5, ignore_eos=True, eos_early_stop=False
)
_SEED = 0


class BenchError(ValueError):
    """A measurement that cannot be made, or whose two sides disagree."""


def bench_decode(
    prompt_length: int = 512,
    new_tokens: int = 256,
    batches: Sequence[int] = (1, 8),
    width: int = 4,
    repeats: int = 3,
    config: ModelConfig | None = None,
    report: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Measures decoding of random prompts by random weights of the counting model's shape.

    Random weights are never sure of a token: a forward pass fills about one (``tokens_per_forward``
    says how many), so this measures forward passes and what is between them.

    Args:
      prompt_length: tokens of each prompt.
      new_tokens: tokens to generate for each.
      batches: numbers of prompts decoded together.
      width: factor on all widths of the model.
      repeats: the median of so many runs is reported.
      config: another model to measure; ``width`` applies to it.
      report: is told what is going on.

    Returns:
      ``{"device", "model", "reference", "batch": {"1": {"tokens_per_second",
      "forwards_per_second", "tokens_per_forward", "speedup_vs_reference_loop"}, …}}``. Forwards
      per second count forward passes of the whole batch. The reference loop decodes one prompt at
      a time, so its tokens per second are those of every batch.

    Raises:
      BenchError: if the loops do not write the same tokens in the same number of forwards.
    """
    enable_compilation_cache()
    config = widen(config or ModelConfig.from_name("counting"), width)
    _check(config, prompt_length, new_tokens, batches, repeats)
    model = LLaDA2(config)
    report("making weights")
    params = model.init_params(jax.random.key(_SEED))
    prompts = np.random.default_rng(_SEED).integers(
        0, min(config.mask_token_id, config.vocab_size), (max(batches), prompt_length), np.int32
    )
    sampling = dataclasses.replace(SAMPLING, max_tokens=new_tokens)
    decoder = Decoder(ModelDenoiser(model))
    reference = ReferenceLoop(model, params, sampling)

    def decode(rows: Int[np.ndarray, "B P"]) -> DecodeResult:
        return jax.block_until_ready(decoder.decode(params, *_arguments(decoder, rows, sampling)))

    report("compiling the reference loop, once for each window length")
    reference.warm_up(prompt_length, new_tokens)
    for batch in batches:
        report(f"compiling the decoder for batch {batch}")
        decode(prompts[:batch])
    reference_seconds: list[float] = []
    seconds: dict[int, list[float]] = {batch: [] for batch in batches}
    results: dict[int, DecodeResult] = {}
    expected, forwards = np.zeros(0, np.int32), 0
    for repeat in range(repeats):
        report(f"run {repeat + 1} of {repeats}: the reference loop, one prompt")
        spent, (expected, forwards) = _timed(lambda: reference.generate(prompts[0], new_tokens))
        reference_seconds.append(spent)
        for batch in batches:
            report(f"run {repeat + 1} of {repeats}: the decoder, batch {batch}")
            spent, results[batch] = _timed(lambda batch=batch: decode(prompts[:batch]))
            seconds[batch].append(spent)
    report("comparing tokens")
    written = slice(prompt_length, prompt_length + new_tokens)
    for batch, result in results.items():
        _check_same(f"batch {batch}", result, 0, written, expected, forwards)
    alone = decode(prompts[-1:])
    last = np.asarray(alone.tokens)[0, written], int(alone.num_forwards[0])
    largest = max(batches)
    _check_same(f"the last row of batch {largest}", results[largest], largest - 1, written, *last)

    reference_speed = new_tokens / statistics.median(reference_seconds)
    return {
        "device": _device(),
        "model": {"parameters": count_parameters(config).total, "hidden_size": config.hidden_size},
        "prompt_length": prompt_length,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "reference": {
            "tokens_per_second": reference_speed,
            "forwards_per_second": forwards / statistics.median(reference_seconds),
        },
        "batch": {
            str(batch): _row(
                results[batch], new_tokens, statistics.median(seconds[batch]), reference_speed
            )
            for batch in batches
        },
    }


def widen(config: ModelConfig, width: int) -> ModelConfig:
    """The same layers, heads, experts and vocabulary with all widths multiplied.

    Four times the counting model's head dimension is the released models' 128.
    """
    return dataclasses.replace(
        config,
        hidden_size=config.hidden_size * width,
        intermediate_size=config.intermediate_size * width,
        moe_intermediate_size=config.moe_intermediate_size * width,
        head_dim=config.head_dim * width,
        rotary_dim=config.rotary_dim * width,
    )


def _check(
    config: ModelConfig, prompt_length: int, new_tokens: int, batches: Sequence[int], repeats: int
) -> None:
    for name, value in (
        ("prompt_length", prompt_length),
        ("new_tokens", new_tokens),
        ("repeats", repeats),
        ("batch", min(batches, default=0)),
    ):
        if value < 1:
            raise BenchError(f"{name} = {value} must be at least 1")
    if prompt_length + new_tokens > config.max_position_embeddings:
        raise BenchError(
            f"prompt_length + new_tokens = {prompt_length + new_tokens} exceeds the model's "
            f"context of {config.max_position_embeddings}"
        )


def _arguments(
    decoder: Decoder, prompts: np.ndarray, sampling: SamplingParams
) -> tuple[np.ndarray, np.ndarray, np.ndarray, RowSettings]:
    requests = [Request(i, tuple(row), sampling, seed=0) for i, row in enumerate(prompts.tolist())]
    batch = make_batch(requests, decoder, (), max_rows=len(requests))
    return batch.tokens, batch.prompt_length, batch.end, batch.settings


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def _row(
    result: DecodeResult, new_tokens: int, seconds: float, reference_speed: float
) -> dict[str, float]:
    batch = len(result.num_forwards)
    each = np.asarray(result.num_forwards)
    commits = np.asarray(result.num_commit_forwards)
    speed = batch * new_tokens / seconds
    return {
        "tokens_per_second": speed,
        "forwards_per_second": float((each + commits).max()) / seconds,
        "tokens_per_forward": float(batch * new_tokens / each.sum()),
        "speedup_vs_reference_loop": speed / reference_speed,
        "reference_tokens_per_second": reference_speed,
        "seconds": seconds,
    }


def _check_same(
    name: str,
    result: DecodeResult,
    row: int,
    written: slice,
    expected: np.ndarray,
    forwards: int,
) -> None:
    tokens = np.asarray(result.tokens)[row, written]
    if not np.array_equal(tokens, expected):
        place = int((tokens != expected).argmax())
        raise BenchError(
            f"{name}: new token {place} is {tokens[place]}, but {expected[place]} in the "
            "reference; the speeds cannot be compared"
        )
    if int(result.num_forwards[row]) != forwards:
        raise BenchError(
            f"{name}: {int(result.num_forwards[row])} forwards, but {forwards} in the reference"
        )


def _device() -> str:
    device = jax.devices()[0]
    if device.platform == "cpu":
        return f"cpu, {os.cpu_count()} cores"
    return f"{device.device_kind} ({device.platform}), {jax.device_count()} of them"
