"""Decoding the way the released code does it: the host drives, and nothing is cached.

Each step is one forward pass over the whole text so far, ``x[:, : (k + 1) * C]``, for one prompt;
the logits of the last block come to the host, where numpy decides. What can be compiled is: the
forward, once for each window length. It is kinder than the original in one point: only the last
block goes through the head.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llada_jax.decoding import SamplingParams
from llada_jax.model import LLaDA2
from pallas_kernels import block_causal


class ReferenceLoop:
    """LLaDA2.1's released loop over a model: greedy, one prompt, no cache, no early stop.

    The mask token is never predicted, as with ``ban_mask`` (the released code may loop for ever).

    Args:
      model: the architecture.
      params: its weights.
      sampling: ``threshold``, ``editing_threshold``, ``max_post_steps``, ``num_to_transfer`` and
        ``block_length`` count.
    """

    def __init__(self, model: LLaDA2, params: Any, sampling: SamplingParams):
        self._sampling = sampling
        self._mask_token_id = model.config.mask_token_id
        self._forward = functools.partial(_last_block, model, sampling.block_length, params)

    def warm_up(self, prompt_length: int, new_tokens: int) -> None:
        """Compiles the forward for every window length of such a request."""
        for block in self._blocks(prompt_length, new_tokens):
            length = (block + 1) * self._sampling.block_length
            window = np.full((1, length), self._mask_token_id, np.int32)
            jax.block_until_ready(self._forward(window))

    def generate(
        self, prompt: Sequence[int] | Int[np.ndarray, " P"], new_tokens: int
    ) -> tuple[Int[np.ndarray, " n"], int]:
        """Continues a prompt.

        Returns:
          The new tokens, and how many forward passes they took.
        """
        width = self._sampling.block_length
        blocks = self._blocks(len(prompt), new_tokens)
        canvas = np.full((1, blocks.stop * width), self._mask_token_id, np.int32)
        canvas[0, : len(prompt)] = prompt
        forwards = 0
        for block in blocks:
            window = canvas[:, : (block + 1) * width]
            generated = np.arange(block * width, (block + 1) * width) >= len(prompt)
            forwards += self._denoise(window, generated)
        return canvas[0, len(prompt) : len(prompt) + new_tokens], forwards

    def _blocks(self, prompt_length: int, new_tokens: int) -> range:
        width = self._sampling.block_length
        return range(prompt_length // width, -(-(prompt_length + new_tokens) // width))

    def _denoise(self, window: np.ndarray, generated: np.ndarray) -> int:
        """Decodes the last block of ``window`` in place; returns the forward passes."""
        sampling = self._sampling
        block = window[0, -sampling.block_length :]
        editing = sampling.editing_threshold
        forwards = post_steps = 0
        while True:
            masked = generated & (block == self._mask_token_id)
            post_steps += not masked.any()
            if post_steps > sampling.max_post_steps:
                return forwards
            logits = np.array(self._forward(window))
            forwards += 1
            proposal, confidence = self._propose(logits)
            fill = self._fill(masked, confidence)
            edit = np.zeros_like(fill)
            if editing is not None:
                edit = generated & ~masked & (confidence > editing) & (proposal != block)
            write = fill | edit
            block[write] = proposal[write]
            if not masked.any() and not edit.any():
                return forwards

    def _propose(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits[:, self._mask_token_id] = -np.inf
        proposal = logits.argmax(-1)
        best = logits.max(-1)
        return proposal, 1 / np.exp(logits - best[:, None]).sum(-1)

    def _fill(self, masked: np.ndarray, confidence: np.ndarray) -> np.ndarray:
        above = masked & (confidence > self._sampling.threshold)
        if above.sum() >= self._sampling.num_to_transfer:
            return above
        ranked = np.argsort(np.where(masked, -confidence, np.inf), kind="stable")
        fill = np.zeros_like(masked)
        fill[ranked[: min(self._sampling.num_to_transfer, masked.sum())]] = True
        return fill


@functools.partial(jax.jit, static_argnums=(0, 1))
def _last_block(
    model: LLaDA2, block_length: int, params: Any, window: Int[Array, "1 L"]
) -> Float[Array, "C V"]:
    """Logits of the last block of a window; compiled once for each window length."""
    span = jnp.arange(window.shape[1])
    mask = block_causal(span[:, None], span[None, :], block_length)[None]
    out: Any = model.apply({"params": params}, window, mask=mask)
    return model.apply({"params": params}, out.hidden[:, -block_length:], method="logits")[0]
