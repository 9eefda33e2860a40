"""The decoder's pieces on the golden model: they all give what one compiled run gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax import SamplingParams
from llada_jax.checkpoint import load_hf
from llada_jax.decoding import Decoder, ModelDenoiser, Phase, RowSettings, result_of
from llada_jax.parallel import make_mesh, named_sharding

MASK, EOS = 319, 318
CANVAS = 128
ROWS = 4


def encode(text: str) -> list[int]:
    return [ord(character) - 16 for character in text]


REQUESTS = [
    (encode("17,18,19,20,"), SamplingParams.speed(max_tokens=40)),
    (encode("2,4,6,8,10,12,14,16,18,20,22,24,26,28,"), SamplingParams.quality(max_tokens=60)),
    (encode("5,10,15,"), SamplingParams.v20(max_tokens=30)),
    (
        encode("7,"),
        SamplingParams(max_tokens=50, temperature=0.8, top_k=20, seed=7, threshold=0.4),
    ),
]


@pytest.fixture(scope="module")
def decoder(counting):
    return Decoder(ModelDenoiser(counting[0]), prefill_chunk=32)


def canvas_of(prompt, length=CANVAS):
    tokens = np.full(length, MASK, np.int32)
    tokens[: len(prompt)] = prompt
    return tokens


def end_of(prompt, params):
    return -(-(len(prompt) + params.max_tokens) // 32) * 32


def batch_of(requests, rows=ROWS, length=CANVAS):
    """Arguments of ``Decoder.decode``; places beyond the requests are inert."""
    padding = rows - len(requests)
    params = [p for _, p in requests] + [SamplingParams()] * padding
    return (
        np.stack([canvas_of(prompt, length) for prompt, _ in requests + [([], None)] * padding]),
        np.array([len(prompt) for prompt, _ in requests] + [0] * padding, np.int32),
        np.array([end_of(*request) for request in requests] + [0] * padding, np.int32),
        RowSettings.from_params(params, [EOS], [p.seed or 0 for p in params]),
    )


def rows_of(result, requests):
    result = jax.device_get(result)
    return [
        (
            result.tokens[row, : end_of(*request)].tolist(),
            int(result.num_forwards[row]),
            int(result.num_commit_forwards[row]),
        )
        for row, request in enumerate(requests)
    ]


@pytest.fixture(scope="module")
def expected(decoder, counting):
    return rows_of(decoder.decode(counting[1], *batch_of(REQUESTS)), REQUESTS)


def test_batched_equals_alone(decoder, counting, expected):
    for request, together in zip(REQUESTS, expected, strict=True):
        alone = rows_of(decoder.decode(counting[1], *batch_of([request])), [request])
        assert alone == [together]


def test_permuted_batch(decoder, counting, expected):
    order = [2, 0, 3, 1]
    requests = [REQUESTS[i] for i in order]
    got = rows_of(decoder.decode(counting[1], *batch_of(requests)), requests)
    assert got == [expected[i] for i in order]


def test_longer_canvas_and_other_prefill_chunks(counting, expected):
    """What a shape bucket adds does not matter, nor how a prompt is cut for prefill."""
    for chunk in (64, 192):
        decoder = Decoder(ModelDenoiser(counting[0]), prefill_chunk=chunk)
        arguments = batch_of(REQUESTS, length=192)
        assert rows_of(decoder.decode(counting[1], *arguments), REQUESTS) == expected


def test_step_by_step_equals_at_once(decoder, counting, expected):
    """``run`` in pieces of three forwards, or until a block is committed."""
    for options in ({"max_forwards": 3}, {"until_commit": True}):
        state = decoder.start(counting[1], *batch_of(REQUESTS))
        visits = 0
        while not bool(state.done.all()):
            state, _ = decoder.run(counting[1], state, **options)
            visits += 1
        assert visits > 3
        assert rows_of(result_of(state), REQUESTS) == expected


def test_a_finished_row_gives_its_place_to_a_new_request(decoder, counting, expected):
    """Two places serve four requests; nothing compiles after the first of each call."""
    params = counting[1]
    waiting = list(range(2, len(REQUESTS)))
    serving = [0, 1]
    state = decoder.start(params, *batch_of(REQUESTS[:2], rows=2))
    results = {}
    compiled = None
    while serving != [None, None]:
        state, _ = decoder.run(params, state, until_commit=True)
        for place in np.flatnonzero(np.asarray(state.done)):
            request = serving[place]
            if request is None:
                continue
            got = rows_of(result_of(state), [REQUESTS[request]] * 2)[place]
            results[request] = got
            serving[place] = waiting.pop(0) if waiting else None
            if serving[place] is not None:
                prompt, sampling = REQUESTS[serving[place]]
                settings = RowSettings.from_params([sampling], [EOS], [sampling.seed or 0])
                state = decoder.insert(
                    params, state, place, canvas_of(prompt), len(prompt),
                    end_of(prompt, sampling), settings,
                )  # fmt: skip
                sizes = (type(decoder).run._cache_size(), type(decoder).insert._cache_size())
                assert compiled in (None, sizes)
                compiled = sizes
    assert [results[i] for i in range(4)] == expected


def test_halted_rows_stop_and_others_go_on(decoder, counting, expected):
    state = decoder.start(counting[1], *batch_of(REQUESTS))
    state, _ = decoder.run(counting[1], state, max_forwards=2)
    state = decoder.halt(state, np.array([True, False, False, False]))
    halted = np.asarray(state.tokens[0])
    state, _ = decoder.run(counting[1], state)
    np.testing.assert_array_equal(state.tokens[0], halted)
    assert int(state.num_forwards[0]) == 2
    assert rows_of(result_of(state), REQUESTS)[1:] == expected[1:]


def test_committed_cache_is_that_of_the_final_tokens(decoder, counting):
    """The invariant of ``DecodeState``: a fresh prefill of the result gives the same cache."""
    _, params = counting
    state = decoder.start(params, *batch_of(REQUESTS))
    state, _ = decoder.run(params, state)
    committed = np.asarray(state.position)
    again = decoder.start(
        params, np.asarray(state.tokens), committed, committed + 32, state.settings
    )
    for row, length in enumerate(committed):
        for ours, fresh in ((state.cache.keys, again.cache.keys),
                            (state.cache.values, again.cache.values)):  # fmt: skip
            np.testing.assert_allclose(
                ours[:, row, :, :length], fresh[:, row, :, :length], atol=2e-5
            )


def test_mask_id_in_a_prompt_is_a_token_like_any_other(decoder, counting):
    prompt = [*encode("17,18,"), MASK, EOS, *encode("19,20,")]
    request = (prompt, SamplingParams.speed(max_tokens=20))
    tokens, forwards, _ = rows_of(decoder.decode(counting[1], *batch_of([request])), [request])[0]
    assert tokens[: len(prompt)] == prompt
    assert MASK not in tokens[len(prompt) :]
    assert forwards > 1


def test_multi_block_editing_keeps_the_cache_exact(counting):
    """After every rewrite of a window, keys and values are those of a fresh prefill."""
    params = counting[1]
    decoder = Decoder(ModelDenoiser(counting[0]), prefill_chunk=32, max_window=2)
    rng = np.random.default_rng(0)
    sampling = SamplingParams.speed(
        max_tokens=90, multi_block_window=2, threshold=0.05, max_post_steps=0, ignore_eos=True
    )
    requests = [(rng.integers(16, 60, size=n).tolist(), sampling) for n in (5, 31, 40)]
    requests.append((encode("17,18,19,"), SamplingParams.speed(max_tokens=60)))
    state = decoder.start(params, *batch_of(requests, length=160))
    rewrites = 0
    while not bool(state.done.all()):
        phase = np.asarray(state.phase)
        state, _ = decoder.run(params, state, max_forwards=1)
        rewritten = np.flatnonzero(phase == Phase.REWRITE_WINDOW)
        if not len(rewritten):
            continue
        rewrites += len(rewritten)
        committed = np.asarray(state.position)
        again = decoder.start(
            params, np.asarray(state.tokens), committed, committed + 32, state.settings
        )
        for row in rewritten:
            span = (slice(None), row, slice(None), slice(committed[row]))
            np.testing.assert_allclose(state.cache.keys[span], again.cache.keys[span], atol=1e-4)
            np.testing.assert_allclose(
                state.cache.values[span], again.cache.values[span], atol=1e-4
            )
    assert rewrites > 3
    plain = rows_of(result_of(state), requests)[3]  # a row without a window is not touched
    alone = Decoder(ModelDenoiser(counting[0]), prefill_chunk=32)
    result = alone.decode(params, *batch_of(requests[3:]))
    assert plain == rows_of(result, requests[3:])[0]


def test_insert_with_other_numbers_of_stop_tokens(decoder, counting, expected):
    """A request with fewer slots is padded; one with more than the batch has is an error."""
    prompt, sampling = REQUESTS[0]
    row = (canvas_of(prompt), len(prompt), end_of(prompt, sampling))
    narrow = RowSettings.from_params([sampling], [EOS], [0], stop_slots=2)
    wide = RowSettings.from_params([sampling], [EOS], [0], stop_slots=16)
    state = decoder.start(counting[1], *batch_of(REQUESTS))
    state = decoder.insert(counting[1], state, 1, *row, narrow)
    state, _ = decoder.run(counting[1], state)
    assert rows_of(result_of(state), REQUESTS[:1] * 2)[1] == expected[0]
    with pytest.raises(ValueError, match=r"needs 16 stop-token slots.*started with 8"):
        decoder.insert(counting[1], state, 1, *row, wide)


def test_sharded_equals_unsharded(decoder, counting, expected, golden):
    mesh = make_mesh(tensor=2, expert=4)
    _, params = load_hf(golden, mesh=mesh)
    spread = params["moe_layers"]["moe"]["experts"]["gate"].sharding
    assert len(spread.device_set) == 8
    with jax.set_mesh(mesh):
        assert rows_of(decoder.decode(params, *batch_of(REQUESTS)), REQUESTS) == expected


def test_mesh_errors():
    with pytest.raises(ValueError, match="needs 6 devices"):
        make_mesh(data=3, tensor=2)
    mesh = make_mesh(tensor=8)
    with pytest.raises(ValueError, match=r"'kv_heads' of size 4 does not divide.*use 4 there"):
        named_sharding(("kv_heads",), (4,), mesh)
    with pytest.raises(ValueError, match="map twice to mesh axis 'tensor'"):
        named_sharding(("heads", "mlp"), (8, 8), mesh)


def test_canvas_errors(counting):
    denoiser = ModelDenoiser(counting[0])
    with pytest.raises(ValueError, match="prefill_chunk = 48 must be a multiple"):
        Decoder(denoiser, prefill_chunk=48)
    decoder = Decoder(denoiser, prefill_chunk=64)
    assert decoder.canvas_length(1) == 32
    assert decoder.canvas_length(65) == 128
    with pytest.raises(ValueError, match="use canvas_length"):
        decoder.decode(counting[1], *batch_of(REQUESTS[:1], length=96))


def test_states_are_typed(decoder, counting):
    """Every array of the loop state keeps shape and dtype over a step (else it would recompile)."""
    shapes = jax.eval_shape(lambda p, a: decoder.start(p, *a), counting[1], batch_of(REQUESTS))
    after = jax.eval_shape(lambda p, s: decoder.run(p, s)[0], counting[1], shapes)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), shapes) == jax.tree.map(
        lambda a: (a.shape, a.dtype), after
    )
    assert dataclasses.is_dataclass(shapes)
    assert shapes.tokens.dtype == jnp.int32
