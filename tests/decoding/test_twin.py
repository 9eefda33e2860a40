"""The compiled decoder against its plain-Python twin, over random settings and toy denoisers."""

import jax
import numpy as np
import pytest

from llada_jax import SamplingParams
from llada_jax.decoding import Decoder, RowSettings
from tests.decoding import toy, twin

SIZE = 32
CANVAS = 160
ROWS = 16  # settings decoded together, each against its own twin
DECODER = Decoder(toy.ToyDenoiser(), block_length=SIZE, prefill_chunk=SIZE)
WINDOWED = Decoder(toy.ToyDenoiser(), block_length=SIZE, prefill_chunk=SIZE, max_window=3)


def random_params(rng: np.random.Generator, kind: str) -> SamplingParams:
    common = {
        "max_tokens": int(rng.integers(1, 70)),
        "max_post_steps": int(rng.choice([0, 1, 3, 16])),
        "num_to_transfer": int(rng.choice([1, 1, 2, 5])),
        "eos_early_stop": bool(rng.random() < 0.7),
        "ban_mask": bool(rng.random() < 0.8),
        "penalty_lambda": float(rng.choice([0.0, 0.0, 1.5])),
    }
    if kind == "v20":
        steps = int(rng.choice([32, 32, 16, 7, 1, 40]))
        return SamplingParams.v20(**common | {"steps": steps})
    if kind == "v21 quality":
        return SamplingParams.quality(**common)
    if kind == "v21 speed":
        return SamplingParams.speed(**common)
    if kind == "forced":  # nothing passes the threshold: the best ones a step, edits on
        return SamplingParams(**common | {"threshold": 1.0, "editing_threshold": 0.6})
    if kind == "quota with edits":
        return SamplingParams.speed(**common | {"steps": int(rng.choice([32, 8]))})
    if kind == "drawn":
        return SamplingParams(
            **common,
            temperature=float(rng.choice([0.5, 1.0, 1.7])),
            top_k=int(rng.choice([0, 3, 10])),
            top_p=float(rng.choice([1.0, 0.9, 0.5])),
            min_p=float(rng.choice([0.0, 0.05])),
            seed=int(rng.integers(2**32)),
            threshold=0.4,
        )
    assert kind == "window"
    quantile = None if rng.random() < 0.6 else 0.75
    return SamplingParams.speed(
        **common | {"max_tokens": int(rng.integers(33, 80))},
        multi_block_window=int(rng.choice([1, 2, 3])),
        multi_block_steps=int(rng.choice([1, 2, 5])),
        multi_block_entropy_quantile=quantile,
    )


def toy_twin(table_params, params, prompt) -> twin.TwinResult:
    def logits(canvas, span_start, full):
        positions = np.arange(len(canvas))
        blocks = positions // SIZE
        own = (positions[:, None] >= span_start) & (positions[None, :] >= span_start)
        visible = blocks[None, :] <= blocks[:, None]
        return toy.toy_logits(table_params, canvas, visible | (own & full), own)

    stops = set() if params.ignore_eos else {toy.EOS}
    return twin.decode(logits, prompt, params, toy.MASK, stops)


def run(decoder, table_params, cases):
    """Decodes ``cases`` of ``(params, prompt)`` as one batch, padded to ``ROWS``."""
    tokens = np.full((ROWS, CANVAS + (decoder.max_window - 1) * SIZE), toy.MASK, np.int32)
    prompt_length, end = np.zeros(ROWS, np.int32), np.zeros(ROWS, np.int32)
    for row, (params, prompt) in enumerate(cases):
        tokens[row, : len(prompt)] = prompt
        prompt_length[row] = len(prompt)
        end[row] = -(-(len(prompt) + params.max_tokens) // SIZE) * SIZE
    filler = [SamplingParams()] * (ROWS - len(cases))
    params = [p for p, _ in cases] + filler
    settings = RowSettings.from_params(params, [toy.EOS], [p.seed or 0 for p in params])
    return jax.device_get(decoder.decode(table_params, tokens, prompt_length, end, settings))


def make_cases(seed: int, kinds: list[str], tails: range):
    rng = np.random.default_rng(seed)
    cases = []
    for n, tail in enumerate(tails):
        prompt = rng.integers(0, toy.VOCABULARY, size=SIZE * int(rng.integers(0, 2)) + tail)
        if len(prompt) == 0:
            prompt = rng.integers(0, toy.VOCABULARY, size=SIZE)
        # Prompts may hold the end-of-text and the mask id; neither may matter there.
        cases.append((random_params(rng, kinds[n % len(kinds)]), prompt.tolist()))
    return cases


def check(decoder, table_params, cases):
    result = run(decoder, table_params, cases)
    for row, (params, prompt) in enumerate(cases):
        expected = toy_twin(table_params, params, prompt)
        got = result.tokens[row, len(prompt) : len(prompt) + len(expected.tokens)]
        assert got.tolist() == expected.tokens, (row, params)
        assert int(result.num_forwards[row]) == expected.forwards, (row, params)
        assert int(result.num_edits[row]) == expected.edits, (row, params)
        assert result.tokens[row, : len(prompt)].tolist() == prompt


KINDS = ["v20", "v21 quality", "v21 speed", "forced", "quota with edits"]


@pytest.mark.parametrize("coupling", [0, 1])
@pytest.mark.parametrize("sharpness", [0.6, 1.5, 4.0])
@pytest.mark.parametrize("half", [range(16), range(16, 32)])
@pytest.mark.parametrize("repeat", [0, 1])
def test_equals_twin(coupling, sharpness, half, repeat):
    """384 settings: every prompt tail, edits that settle (coupling 0) and that oscillate (1)."""
    seed = 1000 * repeat + 100 * coupling + int(10 * sharpness) + half[0]
    table = {"table": toy.make_table(seed, sharpness), "coupling": np.int32(coupling)}
    check(DECODER, table, make_cases(seed, KINDS, half))


@pytest.mark.parametrize("seed", range(4))
def test_equals_twin_when_drawn(seed):
    table = {"table": toy.make_table(seed, 1.5), "coupling": np.int32(seed % 2)}
    check(DECODER, table, make_cases(seed, ["drawn", "v21 quality"], range(seed, 32, 2)))


@pytest.mark.parametrize("seed", range(6))
def test_multi_block_editing_equals_its_recomputed_twin(seed):
    """The cache after a window was edited is that of an uncached run."""
    table = {"table": toy.make_table(seed, 1.5), "coupling": np.int32(1)}
    check(WINDOWED, table, make_cases(seed, ["window"], range(seed, 32, 2)))


def test_end_of_text_that_is_edited_away_does_not_stop():
    """Among the settings above, some write the end token and take it back."""
    seen = 0
    for seed in range(8):
        table = {"table": toy.make_table(seed, 1.5), "coupling": np.int32(1)}
        params = SamplingParams.speed(max_tokens=60)
        cases = [(params, [1, 2, 3])]
        expected = toy_twin(table, *cases[0])
        withdrawn = any(
            was == toy.EOS and is_ != toy.EOS
            for _, before, after in expected.steps
            for was, is_ in zip(before, after, strict=True)
        )
        if withdrawn and toy.EOS not in expected.tokens[:29]:
            seen += 1
            check(DECODER, table, cases)
    assert seen > 0


def test_mask_that_stays_the_argmax_ends_by_the_cap():
    """The released loop would not return: the mask is predicted for ever."""
    table = toy.make_table(0, 1.0)
    table[:, toy.MASK] += 30
    params = SamplingParams.quality(max_tokens=20, ban_mask=False)
    weights = {"table": table, "coupling": np.int32(0)}
    result = run(DECODER, weights, [(params, [1, 2])])
    assert int(result.num_forwards[0]) == 4 * SIZE + params.max_post_steps
    assert (result.tokens[0, 2:22] == toy.MASK).all()
    banned = SamplingParams.quality(max_tokens=20)
    assert (run(DECODER, weights, [(banned, [1, 2])]).tokens[0, 2:22] != toy.MASK).all()
