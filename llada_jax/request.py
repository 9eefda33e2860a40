"""From user input to decoder arrays and back: checks, shape buckets, cutting at the end."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from llada_jax.config import ModelConfig
from llada_jax.decoding import Decoder, RowSettings, SamplingParams
from llada_jax.text import Tokenizer, find_stop


class PromptError(ValueError):
    """A prompt that cannot be continued; the message says which one, why, and the way out."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt, checked.

    Attributes:
      index: its place among the user's prompts.
      prompt: token ids.
      params: how to continue it.
      seed: of its draws.
    """

    index: int
    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int

    @property
    def end(self) -> int:
        """First position after the canvas: the wanted tokens, rounded up to whole blocks."""
        block = self.params.block_length
        return -(-(len(self.prompt) + self.params.max_tokens) // block) * block


def as_prompts(prompts: Any) -> list[str | list[int]]:
    """What users pass as prompts, as a list of texts and lists of token ids.

    Raises:
      PromptError: if it is neither a text nor a collection of prompts, or ids are not integers.
    """
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, (bytes, Mapping)) or not isinstance(prompts, Iterable):
        raise PromptError(
            f"prompts is a {type(prompts).__name__}; give a text, a list of texts, or a list of "
            "lists of token ids"
        )
    return [_as_prompt(i, prompt) for i, prompt in enumerate(prompts)]


def _as_prompt(index: int, prompt: Any) -> str | list[int]:
    if isinstance(prompt, str):
        return str(prompt)
    if isinstance(prompt, Mapping):
        raise PromptError(f"prompt {index} is a chat message; conversations go to chat()")
    if isinstance(prompt, bytes) or not isinstance(prompt, Iterable):
        raise PromptError(
            f"prompt {index} is a {type(prompt).__name__}; a prompt is a text or a list of token "
            "ids, and one prompt of token ids is a list of one list"
        )
    tokens = list(prompt)
    for place, token in enumerate(tokens):
        if not isinstance(token, (int, np.integer)) or isinstance(token, bool):
            raise PromptError(
                f"prompt {index} holds {token!r} at place {place}; token ids are integers"
            )
    return [int(token) for token in tokens]


def make_request(
    index: int,
    prompt: str | Sequence[int],
    params: SamplingParams,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
) -> Request:
    """Encodes and checks one prompt.

    Raises:
      PromptError: if it is empty, needs a tokenizer that is not there, holds an id outside the
        vocabulary, or does not fit the context.
    """
    name = f"prompt {index}"
    if isinstance(prompt, str):
        if tokenizer is None:
            raise PromptError(
                f"{name} is text, but the model folder has no tokenizer; give a list of token ids"
            )
        ids = tokenizer.encode(prompt)
    else:
        ids = list(prompt)
    if not ids:
        raise PromptError(f"{name} is empty; give at least one token")
    for place, token in enumerate(ids):
        if not 0 <= token < config.vocab_size:
            raise PromptError(
                f"{name} holds token id {token} at place {place}; ids go from 0 to "
                f"{config.vocab_size - 1}"
            )
    room = config.max_position_embeddings - len(ids)
    if room < 1:
        raise PromptError(
            f"{name} has {len(ids)} tokens, but the model's context is "
            f"{config.max_position_embeddings}; shorten it"
        )
    if params.max_tokens > room:
        raise PromptError(
            f"{name} has {len(ids)} tokens and max_tokens = {params.max_tokens}, but the model's "
            f"context is {config.max_position_embeddings}; use max_tokens <= {room}"
        )
    if params.stop and tokenizer is None:
        raise PromptError(
            f"{name}: stop = {params.stop!r} needs text, but the model folder has no tokenizer; "
            "use stop_token_ids"
        )
    for token in params.stop_token_ids:
        if token >= config.vocab_size:
            raise PromptError(
                f"stop_token_ids holds {token}; ids go from 0 to {config.vocab_size - 1}"
            )
    seed = secrets.randbits(32) if params.seed is None else params.seed
    return Request(index, tuple(ids), params, seed)


def bucket(count: int) -> int:
    """``count`` rounded up to 1, 2, 3, 4, 6, 8, 12, 16, 24, …: at most half too much."""
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if power >= 4 and count <= power * 3 // 4 else power


@dataclasses.dataclass(frozen=True)
class Batch:
    """The arrays that the decoder takes; rows beyond the requests are inert."""

    tokens: np.ndarray  # int32 [B, S]
    prompt_length: np.ndarray  # int32 [B]
    end: np.ndarray  # int32 [B]
    settings: RowSettings


def make_batch(
    requests: Sequence[Request],
    decoder: Decoder,
    eos_token_ids: Sequence[int],
    max_rows: int,
) -> Batch:
    """Lays requests out in the smallest bucketed batch that holds them."""
    rows = min(max_rows, 1 << (len(requests) - 1).bit_length())
    blocks = bucket(max(request.end for request in requests) // decoder.block_length)
    length = decoder.canvas_length(blocks * decoder.block_length)
    tokens = np.full((rows, length), decoder.denoiser.mask_token_id, np.int32)
    prompt_length = np.zeros(rows, np.int32)
    end = np.zeros(rows, np.int32)
    for row, request in enumerate(requests):
        tokens[row, : len(request.prompt)] = request.prompt
        prompt_length[row] = len(request.prompt)
        end[row] = request.end
    padding = rows - len(requests)
    settings = RowSettings.from_params(
        [r.params for r in requests] + [SamplingParams()] * padding,
        eos_token_ids,
        [r.seed for r in requests] + [0] * padding,
    )
    return Batch(tokens, prompt_length, end, settings)


@dataclasses.dataclass(frozen=True)
class Ending:
    """A finished row's generated part, cut."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: Literal["stop", "length"]


def stop_tokens(params: SamplingParams, eos_token_ids: Sequence[int]) -> frozenset[int]:
    """All token ids that end a request's text."""
    return frozenset([*([] if params.ignore_eos else eos_token_ids), *params.stop_token_ids])


def cut_at_stop(
    generated: Sequence[int],
    params: SamplingParams,
    eos_token_ids: Sequence[int],
    tokenizer: Tokenizer | None,
) -> Ending:
    """Cuts generated ids at the first stop token (kept) or stop string (left out of the text).

    With a stop string, ids are cut behind the token that completes it.
    """
    ids = list(generated[: params.max_tokens])
    stops = stop_tokens(params, eos_token_ids)
    place = next((i for i, token in enumerate(ids) if token in stops), None)
    visible = ids if place is None else ids[:place]
    ids = ids if place is None else ids[: place + 1]
    text = tokenizer.decode(visible) if tokenizer is not None else ""
    found = find_stop(text, params.stop) if params.stop else None
    if found is not None and tokenizer is not None:
        low, high = 1, len(visible)  # the shortest prefix of the ids that shows a stop string
        while low < high:
            middle = (low + high) // 2
            if find_stop(tokenizer.decode(visible[:middle]), params.stop) is not None:
                high = middle
            else:
                low = middle + 1
        return Ending(tuple(visible[:low]), text[:found], "stop")
    return Ending(tuple(ids), text, "length" if place is None else "stop")
