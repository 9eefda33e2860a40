"""The decoder again, as plain Python loops over one row without a cache.

Written from the specification of the released ``generate()`` functions, not from the compiled
code: blocks, then steps, then positions.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from llada_jax import SamplingParams


@dataclasses.dataclass
class TwinResult:
    tokens: list[int]  # generated, up to the end of the last block reached; not cut
    forwards: int
    edits: int
    steps: list[tuple[int, list[int], list[int]]]  # (first position, before, after) a forward


# logits(canvas[: block end], first position of the forward's own span, full attention inside it)
Logits = Callable[[np.ndarray, int, bool], np.ndarray]


def decode(
    logits: Logits,
    prompt: list[int],
    params: SamplingParams,
    mask_token_id: int,
    stop_tokens: set[int],
) -> TwinResult:
    """Decodes one prompt; ``params.seed`` must be set where it draws."""
    size, length = params.block_length, len(prompt)
    blocks = -(-(length + params.max_tokens) // size)
    canvas = np.full(blocks * size, mask_token_id, np.int64)
    canvas[:length] = prompt
    result = TwinResult([], 0, 0, [])
    entropies: dict[int, float] = {}
    first = length // size
    last = first
    for block in range(first, blocks):
        last = block
        entropies[block] = _denoise(
            logits, canvas, block, length, params, mask_token_id, stop_tokens, result
        )
        if params.multi_block_window > 1 and block > first:
            _edit_window(
                logits, canvas, block, first, length, params, mask_token_id, entropies, result
            )
        generated = canvas[length : (block + 1) * size]
        v20 = params.steps is not None and params.editing_threshold is None
        if (params.eos_early_stop or v20) and set(generated.tolist()) & stop_tokens:
            break
    result.tokens = canvas[length : (last + 1) * size].tolist()
    return result


def _denoise(logits, canvas, block, length, params, mask, stops, result) -> float:
    size = params.block_length
    start, end = block * size, (block + 1) * size
    generated = [i for i in range(start, end) if i >= length]
    post = step = 0
    quota_rule = params.steps is not None and params.editing_threshold is None
    steps = min(params.steps, params.max_tokens) if params.steps is not None else None
    entropy = 0.0
    while True:
        masked = [i for i in generated if canvas[i] == mask]
        if quota_rule and (not masked or step >= steps):
            return entropy
        if not masked:
            post += 1
        if not quota_rule and post > params.max_post_steps:
            return entropy
        if step >= 4 * size + params.max_post_steps:
            return entropy
        before = canvas[start:end].copy()
        scores = _adjusted(logits(canvas[:end], start, False)[start:], before, params, mask)
        proposal, confidence = _propose(scores, params, start, step)
        entropy = float(np.mean([_entropy(scores[i - start]) for i in generated]))
        minimum = params.num_to_transfer
        if steps is not None:
            minimum = size // steps + (1 if step < size % steps else 0)
        fill = [i for i in masked if confidence[i - start] > np.float32(params.threshold)]
        if len(fill) < minimum:
            fill = sorted(masked, key=lambda i: (-confidence[i - start], i))[:minimum]
        edit = []
        if params.editing_threshold is not None:
            edit = [
                i
                for i in generated
                if i not in masked
                and confidence[i - start] > np.float32(params.editing_threshold)
                and proposal[i - start] != canvas[i]
            ]
        for i in fill + edit:
            canvas[i] = proposal[i - start]
        step += 1
        result.forwards += 1
        result.edits += len(edit)
        result.steps.append((start, before.tolist(), canvas[start:end].tolist()))
        if quota_rule and params.eos_early_stop and any(canvas[i] in stops for i in fill):
            text = canvas[length:end].tolist()
            stop = next(n for n, token in enumerate(text) if token in stops)
            if mask not in text[:stop]:
                return entropy
        if not quota_rule and not masked and not edit:
            return entropy


def _edit_window(logits, canvas, block, first, length, params, mask, entropies, result):
    size = params.block_length
    window = range(max(first, block - params.multi_block_window + 1), block + 1)
    start, end = window[0] * size, (block + 1) * size
    open_blocks = set(window)
    if params.multi_block_entropy_quantile is not None:
        history = [entropies[b] for b in range(first, block)]
        watermark = np.quantile(
            np.array(history, np.float32), np.float32(params.multi_block_entropy_quantile)
        )
        open_blocks = {b for b in window if b == block or entropies[b] >= watermark - 1e-6}
    for _ in range(params.multi_block_steps):
        before = canvas[start:end].copy()
        scores = logits(canvas[:end], start, True)[start:].copy()
        scores[:, mask] = -np.inf
        edits = {}
        for i in range(max(start, length), end):
            scored = scores[i - start].astype(np.float32)
            token = int(np.argmax(scored))
            probability = _softmax(scored)[token]
            if (
                i // size in open_blocks
                and canvas[i] != mask
                and token != canvas[i]
                and probability > np.float32(params.editing_threshold)
            ):
                edits[i] = token
        for i, token in edits.items():
            canvas[i] = token
        result.forwards += 1
        result.edits += len(edits)
        result.steps.append((start, before.tolist(), canvas[start:end].tolist()))
        if not edits:
            return


def _adjusted(scores, tokens, params, mask) -> np.ndarray:
    scores = scores.astype(np.float32).copy()
    for i in range(1, len(tokens)):
        scores[i, tokens[i - 1]] -= np.float32(params.penalty_lambda)
    if params.ban_mask:
        scores[:, mask] = -np.inf
    return scores


def _softmax(scores: np.ndarray) -> np.ndarray:
    shifted = np.exp(scores - scores.max())
    return shifted / shifted.sum()


def _entropy(scores: np.ndarray) -> float:
    p = _softmax(scores)
    return float(-(p * np.log(np.where(p > 0, p, 1))).sum())


def _propose(scores, params, position, step):
    if params.temperature == 0:
        proposal = scores.argmax(-1)
        confidence = np.array([_softmax(row)[i] for row, i in zip(scores, proposal, strict=True)])
        return proposal, confidence
    scaled = np.stack([_filtered(row / np.float32(params.temperature), params) for row in scores])
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(params.seed), position), step)
    proposal = np.asarray(jax.random.categorical(key, scaled))
    confidence = np.array([_softmax(row)[i] for row, i in zip(scaled, proposal, strict=True)])
    return proposal, confidence


def _filtered(row: np.ndarray, params) -> np.ndarray:
    row = row.copy()
    if params.top_k:
        kth = np.sort(row)[::-1][min(params.top_k, len(row)) - 1]
        row[row < kth] = -np.inf
    if params.top_p is not None and params.top_p < 1:
        order = np.argsort(-row, kind="stable")
        kept, total = [], 0.0
        for token in order:
            kept.append(token)
            total += _softmax(row)[token]
            if total > params.top_p:
                break
        row[row < row[kept].min()] = -np.inf
    if params.min_p:
        p = _softmax(row)
        row[p < params.min_p * p.max()] = -np.inf
    return row
