"""Decode traces of the released LLaDA2.1 ``generate()``: every step, and whole outputs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax import SamplingParams
from llada_jax.decoding import Decoder, ModelDenoiser, RowSettings, steps_of_record
from llada_jax.decoding.rules import mask_to_token, token_to_token
from pallas_kernels import block_causal

CANVAS = 160
RECORD = 128
BLOCK = 32
COMPARED = 22  # cases of the 36 in which no decision is marginal


@pytest.fixture(scope="module")
def cases(golden):
    return json.loads((golden / "decode.json").read_text())


@pytest.fixture(scope="module")
def decoder(counting):
    return Decoder(ModelDenoiser(counting[0]), prefill_chunk=BLOCK, record_steps=RECORD)


def params_of(case) -> SamplingParams:
    """The released code's values; there a threshold above 1 is off, and no token is banned."""
    editing = case["editing_threshold"]
    return SamplingParams(
        max_tokens=case["gen_length"],
        threshold=min(case["threshold"], 1.0),
        editing_threshold=None if editing > 1 else editing,
        max_post_steps=case["max_post_steps"],
        num_to_transfer=case["num_to_transfer"],
        eos_early_stop=case["eos_early_stop"],
        ban_mask=False,
    )


def arrays(case):
    length = len(case["prompt"])
    tokens = np.full(CANVAS, case["mask_token_id"], np.int32)
    tokens[:length] = case["prompt"]
    return tokens, length, -(-(length + case["gen_length"]) // BLOCK) * BLOCK


def batch_of(cases):
    tokens, lengths, ends = zip(*map(arrays, cases), strict=True)
    settings = RowSettings.from_params(
        [params_of(case) for case in cases], [cases[0]["eos_token_id"]], [0] * len(cases)
    )
    return np.stack(tokens), np.array(lengths), np.array(ends), settings


def run_recorded(decoder, params, cases):
    """One batch of cases: final state, and the steps of each row."""
    tokens, lengths, ends, settings = batch_of(cases)
    state = decoder.start(params, tokens, lengths, ends, settings)
    state, record = decoder.run(params, state)
    assert bool(state.done.all())
    record = jax.device_get(record)
    mask = cases[0]["mask_token_id"]
    steps = [steps_of_record(record, row, int(ends[row]), BLOCK, mask) for row in range(len(cases))]
    return jax.device_get(state), steps


def is_marginal(case) -> bool:
    """Whether rounding could flip a decision at a generated position."""
    limits = [case["threshold"], case["editing_threshold"]]
    for _, block, step, _ in steps_with_canvas(case):
        generated = block * BLOCK + np.arange(BLOCK) >= len(case["prompt"])
        p, second = (np.array(step[key])[generated] for key in ("confidence", "runner_up"))
        if any(np.abs(p - limit).min() < 1e-4 for limit in limits) or (p - second).min() < 1e-4:
            return True
    return False


def test_whole_outputs_and_forward_counts(decoder, counting, cases):
    """All cases as one batch; those without a marginal decision agree token for token."""
    state, steps = run_recorded(decoder, counting[1], cases)
    compared = 0
    for row, case in enumerate(cases):
        if is_marginal(case):
            continue
        compared += 1
        start = len(case["prompt"])
        generated = state.tokens[row, start : start + case["gen_length"]].tolist()
        if case["eos_token_id"] in generated:
            generated = generated[: generated.index(case["eos_token_id"]) + 1]
        assert generated == case["output"], row
        assert int(state.num_forwards[row]) == case["forwards"], row
        denoising = [step for step in steps[row] if step.phase.name == "DENOISE"]
        for ours, theirs in zip(denoising, case["steps"], strict=True):
            assert ours.before.tolist() == theirs["block_before"]
            np.testing.assert_allclose(ours.confidence, theirs["confidence"], atol=1e-3)
    assert compared == COMPARED


def steps_with_canvas(case):
    """Every recorded step: canvas before it, block index, the step, the next ``block_before``."""
    mask, (canvas, block) = case["mask_token_id"], (arrays(case)[0], len(case["prompt"]) // BLOCK)
    text = np.array(case["prompt"] + case["output"])
    for i, step in enumerate(case["steps"]):
        following = case["steps"][i + 1]["block_before"] if i + 1 < len(case["steps"]) else None
        canvas[block * BLOCK : (block + 1) * BLOCK] = step["block_before"]
        fresh = following and following.count(mask) > step["block_before"].count(mask)
        yield canvas.copy(), block, step, None if fresh else following
        if fresh:
            block += 1
            canvas[: block * BLOCK] = text[: block * BLOCK]


def test_probabilities_of_every_step(counting, cases):
    """The recorded block, fed as it was, gives the recorded argmax and confidence."""
    model, params = counting

    @jax.jit
    def probabilities(params, tokens):
        place = jnp.arange(tokens.shape[1])
        mask = block_causal(place[:, None], place[None, :], BLOCK)[None]
        out = model.apply({"params": params}, tokens, mask=mask)
        return jax.nn.softmax(model.apply({"params": params}, out.hidden, method="logits"), -1)

    for case in cases:
        canvases, blocks, steps, _ = zip(*steps_with_canvas(case), strict=True)
        padded = np.zeros((RECORD, CANVAS), np.int32)
        padded[: len(canvases)] = canvases
        p = np.asarray(probabilities(params, padded))
        for i, (block, step) in enumerate(zip(blocks, steps, strict=True)):
            ours = p[i, block * BLOCK : (block + 1) * BLOCK]
            confidence, runner_up = np.array(step["confidence"]), np.array(step["runner_up"])
            clear = confidence - runner_up > 1e-4
            np.testing.assert_array_equal(ours.argmax(-1)[clear], np.array(step["argmax"])[clear])
            np.testing.assert_allclose(ours.max(-1), confidence, atol=2e-4)


def test_choices_of_every_step(cases):
    """Γ and Δ of the recorded confidences turn each recorded block into the next one."""
    checked = 0
    for case in cases:
        for _, block, step, following in steps_with_canvas(case):
            if following is None:
                continue
            tokens, proposal = jnp.array([step["block_before"]]), jnp.array([step["argmax"]])
            confidence = jnp.array([step["confidence"]])
            generated = block * BLOCK + jnp.arange(BLOCK)[None] >= len(case["prompt"])
            masked = generated & (tokens == case["mask_token_id"])
            one = jnp.ones(1)
            fill = mask_to_token(
                masked, confidence, case["threshold"] * one, jnp.array([case["num_to_transfer"]])
            )
            edit = token_to_token(
                generated & ~masked, tokens, proposal, confidence, case["editing_threshold"] * one
            )
            assert jnp.where(fill | edit, proposal, tokens)[0].tolist() == following
            checked += 1
    assert checked > 1500
