"""The Python sampling API."""

from __future__ import annotations

import contextlib
import importlib.resources
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import Progress

from llada_jax.checkpoint import load_checkpoint, read_config, resolve_model, stored_dtypes
from llada_jax.compilation_cache import enable_compilation_cache
from llada_jax.config import ModelConfig, read_mapping
from llada_jax.decoding import (
    Decoder,
    DecodeResult,
    ModelDenoiser,
    SamplingParams,
    Trace,
    TraceStep,
    result_of,
    steps_of_record,
)
from llada_jax.generation import Generation, StreamEvent
from llada_jax.model import LLaDA2, check_quantization, quantization_of
from llada_jax.request import (
    PromptError,
    Request,
    as_prompts,
    cut_at_stop,
    make_batch,
    make_request,
    stop_tokens,
)
from llada_jax.text import (
    ChatError,
    ChatTemplate,
    StopStringMatcher,
    StreamDecoder,
    find_stop,
    load_tokenizer,
)
from pallas_kernels import Implementation, check_implementation

BUILTIN_MODELS = ("nano", "counting")
_RECORD_STEPS = 64  # forwards recorded between two visits of the host

Messages = Sequence[Mapping[str, Any]]


class LLM:
    """A LLaDA2.x model with its tokenizer, ready to sample.

        llm = LLM("inclusionAI/LLaDA2.1-mini")
        print(llm.generate("Write quicksort.", SamplingParams.speed(max_tokens=512))[0].text)

    Args:
      model: a folder with ``config.json`` and ``*.safetensors`` (or one that ``llada-jax convert
        --to orbax`` wrote), a hub id, or the name of a built-in model; ``None`` is ``"nano"``,
        which solves small problems in chat form (``"counting"`` goes on from "17,18,19,").
      dtype: type of weights and activations: ``"float32"``, ``"bfloat16"``, or ``"auto"``, the
        checkpoint's own (bfloat16 in place of float16, whose range is too small for this family).
      quantization: ``"int8"`` (a scale an output channel), ``"fp8"`` (a scale a block of 128 x 128)
        or ``"int4"`` (a scale 128 rows of an output channel): quantise the weights while loading;
        router, norms and embedding stay as they are. A folder of quantised weights needs none.
      mesh: devices to shard the weights over (``parallel.make_mesh``); one device by default.
      revision: branch, tag or commit of a hub id.
      max_batch_size: rows decoded together at most; a power of two.
      kv_cache: ``"int8"``: cached keys and values in 8 bits, half the memory of bfloat16; close to,
        no longer equal to, sampling without a cache.
      kernels: ``"pallas"`` or ``"xla"``; ``None``: Pallas on a TPU, XLA elsewhere.
      progress: show a bar while loading.

    Attributes:
      config: the architecture.
      params: the weights.
      quantization: how they are quantised; ``None`` if they are not.
      tokenizer: ``None`` if the folder has none; prompts are then token ids.
      chat_template: ``None`` if the folder has none.
      eos_token_ids: tokens that end a text.

    Raises:
      CheckpointError, TokenizerError, ChatError: if the folder cannot be used.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        dtype: Any = "auto",
        quantization: str | None = None,
        mesh: Mesh | None = None,
        revision: str | None = None,
        max_batch_size: int = 16,
        kv_cache: str | None = None,
        kernels: Implementation | None = None,
        progress: bool = False,
    ):
        if max_batch_size < 1 or max_batch_size & (max_batch_size - 1):
            raise ValueError(f"max_batch_size = {max_batch_size} must be a power of two")
        check_quantization(quantization)
        check_implementation(kernels)
        if kv_cache not in (None, "int8"):
            raise ValueError(f"kv_cache = {kv_cache!r} is neither 'int8' nor None (that of dtype)")
        enable_compilation_cache()
        folder = model_folder(model, revision)
        config = read_config(folder)
        dtype = _activation_dtype(dtype, folder)
        self.config, self.params = load_checkpoint(
            folder,
            config=config,
            dtype=dtype,
            mesh=mesh,
            progress=progress,
            quantization=quantization,
        )
        self.quantization = quantization_of(self.params)
        self.eos_token_ids = _eos_token_ids(folder, self.config)
        self.tokenizer = load_tokenizer(
            folder,
            mask_token_id=self.config.mask_token_id,
            eos_token_ids=self.eos_token_ids,
        )
        try:
            self.chat_template = ChatTemplate.from_folder(folder, self.tokenizer)
        except ChatError as error:
            self.chat_template, self._no_chat = None, error
        self.max_batch_size = max_batch_size
        if not _on_tpu(self.params):
            if kernels == "pallas":
                raise ValueError("kernels = 'pallas' needs a TPU; leave it None, or use 'xla'")
            kernels = "xla"  # what None means here, without tracing the kernels
        self.denoiser = ModelDenoiser(
            LLaDA2(self.config, dtype=dtype, kernels=kernels),
            mesh,
            jnp.int8 if kv_cache else None,
        )

    def generate(
        self,
        prompts: str | Iterable[Any],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[Generation]:
        """Continues prompts.

        Args:
          prompts: one text, or an iterable of texts and lists of token ids.
          params: for all prompts, or one a prompt; quality mode by default.
          progress: show a bar. Like stop strings and traces, it makes the host look at the batch
            after each block; otherwise a batch runs as one compiled program.

        Returns:
          One result a prompt, in their order.

        Raises:
          PromptError: for a prompt that cannot be continued; nothing has been decoded then.
        """
        requests = self._requests(prompts, params)
        results: dict[int, Generation] = {}
        total = sum(request.params.max_tokens for request in requests)
        console = Console(stderr=True)
        with Progress(console=console, disable=not progress, transient=True) as bar:
            task = bar.add_task("decoding", total=total)
            for batch in self._batches(requests):
                ask = any(r.params.stop or r.params.return_trace for r in batch)
                if progress or ask:
                    outcome = self._decode_stepwise(batch, lambda n: bar.advance(task, n))
                else:
                    outcome = self._decode(batch), [None for _ in batch]
                finished = self._generations(batch, *outcome)
                for request, generation in zip(batch, finished, strict=True):
                    results[request.index] = generation
        return [results[i] for i in range(len(requests))]

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        progress: bool = False,
    ) -> list[Generation]:
        """Continues conversations with the assistant's next turn.

        Args:
          messages: one conversation (a list of ``{"role": …, "content": …}``), or several.
          params: as for ``generate``.
          tools: JSON schemas of functions that the model may call.
          progress: as for ``generate``.

        Raises:
          ChatError: if there is no chat template, or a message is malformed.
        """
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Any = [messages] if single else messages
        prompts = [self.render_chat(c, tools=tools) for c in conversations]
        return self.generate(prompts, params, progress=progress)

    def render_chat(
        self, messages: Messages, *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> str:
        """The prompt text of a conversation; errors as for ``chat``."""
        if self.chat_template is None:
            raise self._no_chat
        return self.chat_template.render(messages, tools=tools, add_generation_prompt=True)

    def stream(
        self,
        prompt: str | Iterable[int],
        params: SamplingParams | None = None,
        *,
        steps: bool = False,
    ) -> Iterator[StreamEvent]:
        """Continues one prompt, reporting on the way.

        A block's tokens are final once the block is finished, with multi-block editing once it
        has left the window. The texts of the events, joined, are the generation's text.

        Args:
          prompt: text or token ids.
          params: quality mode by default.
          steps: also report every forward pass (one host visit each).
        """
        requests = self._requests([prompt], params)  # type: ignore[list-item]
        return self._stream(requests[0], steps)

    def decoder_for(
        self, block_length: int = 32, max_window: int = 1, record_steps: int = 0
    ) -> Decoder:
        """The decoding program of these static choices, for use without this class."""
        return Decoder(
            self.denoiser,
            block_length=block_length,
            max_window=max_window,
            prefill_chunk=max(256, block_length),
            record_steps=record_steps,
        )

    def _requests(self, prompts: Any, params: Any) -> list[Request]:
        prompts = as_prompts(prompts)
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if not all(isinstance(p, SamplingParams) for p in params):
            raise PromptError("params must be SamplingParams: one, or a list with one a prompt")
        if len(params) != len(prompts):
            raise PromptError(
                f"{len(prompts)} prompts came with {len(params)} params; give one, or one a prompt"
            )
        return [
            make_request(i, prompt, p, self.config, self.tokenizer)
            for i, (prompt, p) in enumerate(zip(prompts, params, strict=True))
        ]

    def _batches(self, requests: list[Request]) -> Iterator[list[Request]]:
        """Splits requests into batches of alike length; what must differ statically is apart."""

        def static(request: Request) -> tuple[Any, ...]:
            p = request.params
            return p.block_length, p.multi_block_window > 1, p.return_trace, bool(p.stop)

        groups: dict[tuple[Any, ...], list[Request]] = {}
        for request in requests:
            groups.setdefault(static(request), []).append(request)
        for group in groups.values():
            group.sort(key=lambda request: request.end)
            for first in range(0, len(group), self.max_batch_size):
                yield group[first : first + self.max_batch_size]

    def _prepare(self, requests: list[Request], record_steps: int = 0):
        decoder = self.decoder_for(
            requests[0].params.block_length,
            max(request.params.multi_block_window for request in requests),
            record_steps,
        )
        batch = make_batch(requests, decoder, self.eos_token_ids, self.max_batch_size)
        return decoder, (batch.tokens, batch.prompt_length, batch.end, batch.settings)

    def _decode(self, requests: list[Request]) -> DecodeResult:
        decoder, arrays = self._prepare(requests)
        return decoder.decode(self.params, *arrays)

    def _decode_stepwise(self, requests: list[Request], advance) -> tuple[DecodeResult, list]:
        """As ``_decode``, visiting after each block: for stop strings, traces, progress."""
        tracing = any(request.params.return_trace for request in requests)
        decoder, arrays = self._prepare(requests, _RECORD_STEPS if tracing else 0)
        state = decoder.start(self.params, *arrays)
        steps: list[list[TraceStep]] = [[] for _ in requests]
        shown = np.zeros(len(requests), int)
        while True:
            state, record = decoder.run(self.params, state, until_commit=True)
            if record is not None:
                self._collect(jax.device_get(record), requests, decoder, steps)
            tokens, position, done = jax.device_get((state.tokens, state.position, state.done))
            halted = np.array(done)
            for row, request in enumerate(requests):
                final = _final_end(request, int(position[row]), bool(done[row]))
                now = request.params.max_tokens if done[row] else final - len(request.prompt)
                now = max(0, min(now, request.params.max_tokens))
                advance(now - shown[row])
                shown[row] = now
                if request.params.stop and not done[row] and self.tokenizer is not None:
                    text = self.tokenizer.decode(tokens[row, len(request.prompt) : final].tolist())
                    halted[row] = find_stop(text, request.params.stop) is not None
            if (halted & ~done).any():
                state = decoder.halt(state, halted)
                done = halted
            if done.all():
                break
        traces = [
            Trace(
                request.prompt,
                decoder.block_length,
                self.config.mask_token_id,
                request.end,
                tuple(row_steps),
            )
            if request.params.return_trace
            else None
            for request, row_steps in zip(requests, steps, strict=True)
        ]
        return result_of(state), traces

    def _collect(self, record, requests, decoder: Decoder, steps: list[list[TraceStep]]):
        for row, request in enumerate(requests):
            steps[row] += steps_of_record(
                record, row, request.end, decoder.block_length, self.config.mask_token_id
            )

    def _generations(
        self, requests: list[Request], result: DecodeResult, traces: Sequence[Trace | None]
    ) -> Iterator[Generation]:
        result = jax.device_get(result)
        for row, (request, trace) in enumerate(zip(requests, traces, strict=True)):
            start = len(request.prompt)
            ending = cut_at_stop(
                result.tokens[row, start : request.end].tolist(),
                request.params,
                self.eos_token_ids,
                self.tokenizer,
            )
            count = len(ending.token_ids)
            yield Generation(
                prompt_token_ids=request.prompt,
                token_ids=ending.token_ids,
                text=ending.text,
                finish_reason=ending.finish_reason,
                confidences=tuple(result.confidence[row, start : start + count].tolist()),
                num_forwards=int(result.num_forwards[row]),
                num_commit_forwards=int(result.num_commit_forwards[row]),
                num_edits=int(result.num_edits[row]),
                trace=trace,
            )

    def _stream(self, request: Request, with_steps: bool) -> Iterator[StreamEvent]:
        params, prompt_length = request.params, len(request.prompt)
        tracing = with_steps or params.return_trace
        decoder, arrays = self._prepare([request], tracing and (1 if with_steps else _RECORD_STEPS))
        state = decoder.start(self.params, *arrays)
        stops = stop_tokens(params, self.eos_token_ids)
        text = StreamDecoder(self.tokenizer) if self.tokenizer is not None else None
        matcher = StopStringMatcher(params.stop)
        all_steps: list[TraceStep] = []
        sent, ended = 0, False  # generated tokens reported; whether the text is complete
        done = False
        while not done:
            state, record = decoder.run(self.params, state, until_commit=True)
            if record is not None:
                steps: list[list[TraceStep]] = [[]]
                self._collect(jax.device_get(record), [request], decoder, steps)
                all_steps += steps[0]
                if with_steps:
                    for step in steps[0]:
                        yield StreamEvent("step", step=step)
            tokens, position, done = jax.device_get(
                (state.tokens[0], state.position[0], state.done[0])
            )
            final = _final_end(request, int(position), bool(done)) - prompt_length
            final = min(final, params.max_tokens)
            fresh = tokens[prompt_length + sent : prompt_length + final].tolist()
            place = next((i for i, token in enumerate(fresh) if token in stops), None)
            visible = fresh if place is None else fresh[:place]
            fresh = fresh if place is None else fresh[: place + 1]
            if fresh and not ended:
                piece = matcher.push(text.push(visible)) if text is not None else ""
                if matcher.stopped:  # ids end behind the token that completes the stop string
                    so_far = tokens[prompt_length : prompt_length + final].tolist()
                    cut = cut_at_stop(so_far, params, self.eos_token_ids, self.tokenizer)
                    fresh = fresh[: len(cut.token_ids) - sent]
                sent += len(fresh)
                ended = place is not None or matcher.stopped
                yield StreamEvent("block", tuple(fresh), piece)
            if matcher.stopped and not done:
                state = decoder.halt(state, np.ones(1, bool))
                done = True
        rest = matcher.push(text.flush()) + matcher.flush() if text is not None else ""
        trace = Trace(
            request.prompt,
            decoder.block_length,
            self.config.mask_token_id,
            request.end,
            tuple(all_steps),
        )
        result = result_of(state)
        generation = next(
            self._generations([request], result, [trace if params.return_trace else None])
        )
        yield StreamEvent("end", text=rest, generation=generation)


def _final_end(request: Request, position: int, done: bool) -> int:
    """First position that may still change; everything, once a row is done."""
    if done:
        return request.end
    held_back = (request.params.multi_block_window - 1) * request.params.block_length
    return max(len(request.prompt), position - held_back)


def model_folder(model: str | os.PathLike[str] | None = None, revision: str | None = None) -> Path:
    """The folder of a model: built in, on disk, or from the hub.

    Raises:
      CheckpointError: if there is none of that name.
    """
    name = BUILTIN_MODELS[0] if model is None else model
    if name in BUILTIN_MODELS and not Path(name).exists():
        return Path(str(importlib.resources.files("llada_jax"))) / "builtin" / str(name)
    return resolve_model(name, revision=revision)


def _eos_token_ids(folder: Path, config: ModelConfig) -> tuple[int, ...]:
    """Those of ``config.json``, and further ones of ``generation_config.json``."""
    file = folder / "generation_config.json"
    more = read_mapping(file).get("eos_token_id") if file.is_file() else None
    more = [] if more is None else more if isinstance(more, list) else [more]
    return tuple(dict.fromkeys([*config.eos_token_ids, *more]))


def _on_tpu(params: Any) -> bool:
    return any(d.platform == "tpu" for d in jax.tree.leaves(params)[0].devices())


def _activation_dtype(dtype: Any, folder: Path) -> Any:
    if not (isinstance(dtype, str) and dtype == "auto"):
        with contextlib.suppress(TypeError):
            known = jnp.dtype(dtype)
            if known in (jnp.float32, jnp.bfloat16):
                return known
        raise ValueError(f"dtype = {dtype!r} must be 'auto', 'float32' or 'bfloat16'")
    stored = stored_dtypes(folder)["model.word_embeddings.weight"]
    return jnp.dtype(jnp.float32 if stored == np.float32 else jnp.bfloat16)
