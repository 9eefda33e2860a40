"""The sampling API on the built-in model."""

import dataclasses
import json
import logging
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llada_jax import LLM, PromptError, SamplingParams
from llada_jax.checkpoint import CheckpointError
from llada_jax.decoding import Phase
from llada_jax.parallel import make_mesh
from llada_jax.request import as_prompts, bucket
from llada_jax.text import ChatError

PROMPT = "17,18,19,20,"
SPEED = SamplingParams.speed(max_tokens=80)


def assert_same(first, second):
    """Equal to the token; probabilities may differ by rounding between batch shapes."""
    plain = [dataclasses.replace(g, confidences=(), trace=None) for g in (first, second)]
    assert plain[0] == plain[1]
    np.testing.assert_allclose(first.confidences, second.confidences, rtol=1e-4)


@pytest.fixture(scope="module")
def counted(llm):
    return llm.generate(PROMPT, SPEED)[0]


def test_the_three_modes(llm, counted):
    """The released code's 86, 12 and 9 forwards for the same 80 tokens."""
    v20 = SamplingParams(threshold=0.95, editing_threshold=None, max_tokens=80)
    quality = SamplingParams.quality(max_tokens=80)
    results = [*llm.generate([PROMPT] * 2, [v20, quality]), counted]
    assert [result.num_forwards for result in results] == [86, 12, 9]
    for result in results:
        assert result.text == "".join(f"{n}," for n in range(21, 48))[:80]
        assert result.num_tokens == 80
        assert result.finish_reason == "length"
        assert result.tokens_per_forward == 80 / result.num_forwards
        assert len(result.confidences) == 80
        assert all(0 < p <= 1 for p in result.confidences)
        assert list(result.prompt_token_ids) == llm.tokenizer.encode(PROMPT)
    own = llm.generate(PROMPT, SamplingParams.v20(max_tokens=80))[0]
    assert own.text == counted.text
    assert own.num_forwards < 86  # 2.0's loop needs no forward to see that nothing changes


def test_order_and_batch_do_not_matter(llm, counted):
    prompts = ["5,10,", PROMPT, "2,4,6,", "30,31,32,", PROMPT]
    params = [SamplingParams.quality(max_tokens=n) for n in (70, 20, 33, 64)] + [SPEED]
    together = llm.generate(prompts, params)
    assert_same(together[4], counted)
    for prompt, p, result in zip(prompts, params, together, strict=True):
        alone = llm.generate([llm.tokenizer.encode(prompt)], p)[0]
        assert (alone.token_ids, alone.num_forwards) == (result.token_ids, result.num_forwards)
        assert result.num_tokens == p.max_tokens


def test_a_second_request_in_the_same_bucket_compiles_nothing(llm):
    llm.generate("1,2,3,", SamplingParams.quality(max_tokens=70))
    with jax.log_compiles(), Compilations() as compiled:
        llm.generate("11,12,13,14,", SamplingParams.speed(max_tokens=75, temperature=0.5, seed=3))
        llm.generate("9,", SamplingParams.v20(max_tokens=90, stop_token_ids=[40]))
    assert compiled == []


class Compilations(logging.Handler):
    """Collects what jax says when it compiles a program."""

    def __init__(self):
        super().__init__()
        self.found = []

    def emit(self, record):
        if "Compiling" in record.getMessage():
            self.found.append(record.getMessage())

    def __enter__(self):
        logging.getLogger("jax").addHandler(self)
        return self.found

    def __exit__(self, *_):
        logging.getLogger("jax").removeHandler(self)


def test_the_compilation_counter_counts():
    with jax.log_compiles(), Compilations() as compiled:
        jax.jit(lambda x: x * 3 + 1)(np.arange(5))
    assert compiled


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("steps", [False, True])
def test_stream_equals_generate(llm, window, steps):
    params = SPEED if window == 1 else SamplingParams.speed(max_tokens=80, multi_block_window=2)
    whole = llm.generate("4,8,12,", params)[0]
    events = list(llm.stream("4,8,12,", params, steps=steps))
    assert "".join(event.text for event in events) == whole.text
    assert sum((event.token_ids for event in events), ()) == whole.token_ids
    assert [event.kind for event in events].count("end") == 1
    end = events[-1].generation
    # Two compiled programs may differ in a probability's last bit, in nothing else.
    assert dataclasses.replace(end, confidences=whole.confidences) == whole
    assert end.confidences == pytest.approx(whole.confidences, abs=1e-6)
    passes = [event.step for event in events if event.kind == "step"]
    assert len(passes) == (whole.num_forwards + whole.num_commit_forwards if steps else 0)


def test_stream_holds_back_the_open_window(llm):
    """With a window of two blocks, a block is reported only when the next one is finished."""
    params = SamplingParams.speed(max_tokens=110, multi_block_window=2)
    canvas, reported = {}, 0
    for event in llm.stream("4,8,12,", params, steps=True):
        if event.kind == "step":
            for i, token in enumerate(event.step.after):
                position = event.step.start + i - 7
                if 0 <= position < reported:
                    assert canvas[position] == token
                canvas[position] = token
        elif event.kind == "block":
            for token in event.token_ids:
                assert canvas[reported] == token
                reported += 1
    assert reported == 110


def test_stop_string(llm, counted):
    for stop in ("30,", ["99", "25,26"]):
        params = SamplingParams.speed(max_tokens=80, stop=stop)
        result = llm.generate(PROMPT, params)[0]
        first = min(counted.text.find(s) for s in params.stop if s in counted.text)
        assert result.text == counted.text[:first]
        assert result.finish_reason == "stop"
        assert result.num_forwards <= counted.num_forwards
        spelled = llm.tokenizer.decode(list(result.token_ids))
        assert any(spelled.endswith(s) for s in params.stop)
        events = list(llm.stream(PROMPT, params))
        assert "".join(event.text for event in events) == result.text
        assert sum((event.token_ids for event in events), ()) == result.token_ids
        assert_same(events[-1].generation, result)


def test_stop_token(llm, counted):
    comma = llm.tokenizer.encode(",")[0]
    params = SamplingParams.speed(max_tokens=80, stop_token_ids=[comma])
    result = llm.generate(PROMPT, params)[0]
    assert result.text == "21"
    assert result.token_ids == counted.token_ids[:3]
    assert result.finish_reason == "stop"
    late = llm.generate(PROMPT, SamplingParams.speed(
        max_tokens=80, stop_token_ids=[comma], eos_early_stop=False
    ))[0]  # fmt: skip
    assert late.token_ids == result.token_ids
    assert late.num_forwards > result.num_forwards
    events = list(llm.stream(PROMPT, params))
    assert "".join(event.text for event in events) == "21"
    assert sum((event.token_ids for event in events), ()) == result.token_ids


def test_trace_tells_the_whole_story(llm, counted):
    params = SamplingParams.speed(max_tokens=80, return_trace=True)
    result = llm.generate([PROMPT, "1,"], [params, SPEED])[0]
    assert result.token_ids == counted.token_ids
    trace = result.trace
    assert len(trace.steps) == result.num_forwards + result.num_commit_forwards
    canvases = list(trace.canvases())
    start = len(trace.prompt_token_ids)
    assert (canvases[0][start:] == llm.config.mask_token_id).all()
    assert tuple(canvases[-1][start : start + 80]) == result.token_ids
    for step, canvas in zip(trace.steps, canvases, strict=False):
        width = len(step.before)
        np.testing.assert_array_equal(canvas[step.start : step.start + width], step.before)
        changed = step.before != step.after
        np.testing.assert_array_equal(step.unmasked | step.edited, changed)
        assert (step.before[step.unmasked] == llm.config.mask_token_id).all()
        if step.phase in (Phase.COMMIT, Phase.REWRITE_WINDOW):
            assert not changed.any()
    assert sum(int(step.edited.sum()) for step in trace.steps) == result.num_edits
    assert llm.generate("1,", SPEED)[0].trace is None


def test_seeds(llm):
    params = SamplingParams(max_tokens=40, temperature=1.2, threshold=0.3, seed=5)
    first, second = llm.generate([PROMPT] * 2, params)
    assert first == second
    assert_same(llm.generate([PROMPT, "1,2,", "3,"], params)[0], first)
    seeds = [SamplingParams(max_tokens=40, temperature=1.2, threshold=0.3, seed=s) for s in (1, 2)]
    one, two = llm.generate([PROMPT] * 2, seeds)
    assert one.token_ids != two.token_ids
    free = SamplingParams(max_tokens=40, temperature=3.0, threshold=0.0, editing_threshold=None)
    assert len({g.token_ids for g in llm.generate([PROMPT] * 4, free)}) > 1


def test_literal_mask_in_a_prompt(llm):
    result = llm.generate("17,18,<|mask|>", SamplingParams.speed(max_tokens=8))[0]
    assert llm.config.mask_token_id not in result.prompt_token_ids
    assert llm.tokenizer.decode(list(result.prompt_token_ids)) == "17,18,<|mask|>"


def test_progress_shows_and_changes_nothing(llm, counted, capsys):
    assert llm.generate(PROMPT, SPEED, progress=True)[0] == counted


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ("", None, "prompt 0 is empty"),
        ([[1, 2], []], None, "prompt 1 is empty"),
        ([[1, 320]], None, "prompt 0 holds token id 320 at place 1; ids go from 0 to 319"),
        ([[-1]], None, "token id -1"),
        ([33, 39], None, "one prompt of token ids is a list of one list"),
        (b"17,", None, "prompts is a bytes"),
        ([{"role": "user"}], None, r"conversations go to chat\(\)"),
        ([["a"]], None, "prompt 0 holds 'a' at place 0; token ids are integers"),
        ([[34.5, 28]], None, "prompt 0 holds 34.5"),
        ([[True]], None, "prompt 0 holds True"),
        ([[7] * 2048], None, "prompt 0 has 2048 tokens, but the model's context is 2048"),
        ([[7] * 2000], SPEED, "use max_tokens <= 48"),
        ("1,", [SPEED, SPEED], "1 prompts came with 2 params"),
        ("1,", SamplingParams(stop_token_ids=[999]), "stop_token_ids holds 999"),
    ],
)
def test_bad_prompts(llm, prompts, params, message):
    with pytest.raises(PromptError, match=message):
        llm.generate(prompts, params)


def test_prompts_of_other_kinds(llm, counted):
    """Generators, tuples and arrays of ids are prompts too; an empty list has no results."""
    ids = llm.tokenizer.encode(PROMPT)
    for prompts in (iter([PROMPT]), (PROMPT,), np.array([ids]), [np.array(ids)]):
        assert_same(llm.generate(prompts, SPEED)[0], counted)
    assert llm.generate([], SPEED) == []
    with pytest.raises(PromptError, match="prompts is a NoneType; give a text"):
        as_prompts(None)


def test_chat_without_a_template(llm):
    assert llm.chat_template is None
    with pytest.raises(ChatError, match="has no chat template"):
        llm.chat([{"role": "user", "content": "Hi"}])


def test_chat_with_a_template(golden, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(golden, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %},"
        "{% endif %}"
    )
    llm = LLM(folder)
    params = SamplingParams.speed(max_tokens=20)
    answer = llm.chat([{"role": "user", "content": "17,18,19,20"}], params)[0]
    assert_same(answer, llm.generate(PROMPT, params)[0])
    two = llm.chat([[{"role": "user", "content": "17,18,19,20"}]] * 2, params)
    for one in two:
        assert_same(one, answer)


@pytest.fixture(scope="module")
def bare(golden, tmp_path_factory):
    """The golden checkpoint without a tokenizer, stored in bfloat16."""
    folder = tmp_path_factory.mktemp("bare")
    tensors = load_file(golden / "model.safetensors")
    save_file(
        {k: v.astype(jax.numpy.bfloat16) for k, v in tensors.items()}, folder / "model.safetensors"
    )
    shutil.copy(golden / "config.json", folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [318, 28]}))
    return folder


def test_token_ids_in_and_out_without_a_tokenizer(bare):
    llm = LLM(bare)
    assert llm.tokenizer is None
    assert llm.denoiser.model.dtype == jax.numpy.bfloat16
    assert llm.eos_token_ids == (318, 28)  # generation_config.json adds to config.json
    result = llm.generate([[33, 39, 28]], SamplingParams.speed(max_tokens=20))[0]
    assert result.text == ""
    assert result.token_ids[-1] == 28
    assert result.finish_reason == "stop"
    with pytest.raises(PromptError, match="has no tokenizer; give a list of token ids"):
        llm.generate("17,")
    with pytest.raises(PromptError, match="use stop_token_ids"):
        llm.generate([[33]], SamplingParams(stop="x"))


def test_on_a_mesh(golden, counted):
    """Weights sharded over eight devices, two ways of data parallelism among them."""
    llm = LLM(golden, mesh=make_mesh(data=2, fsdp=2, expert=2))
    gate = llm.params["moe_layers"]["moe"]["experts"]["gate"]
    assert len(gate.sharding.device_set) == 8
    assert gate.addressable_shards[0].data.size == gate.size // 4
    assert_same(llm.generate(PROMPT, SPEED)[0], counted)


def test_nan_in_the_weights(golden, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(golden, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.experts.3.up_proj.weight"][0, 0] = np.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.experts\.3\.up_proj"):
        LLM(folder)


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="dtype = 'float16' must be"):
        LLM(dtype="float16")
    with pytest.raises(ValueError, match="max_batch_size = 3"):
        LLM(max_batch_size=3)
    with pytest.raises(CheckpointError, match="does not exist"):
        LLM(tmp_path / "nothing")


def test_buckets():
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 6, 7, 9, 13, 17, 25)] == [
        1, 2, 3, 4, 6, 6, 8, 12, 16, 24, 32,
    ]  # fmt: skip
    assert all(n <= bucket(n) <= 1.5 * n for n in range(1, 500))
