import dataclasses
import json

import numpy as np
import pytest

from llada_jax.bench import decode as bench
from llada_jax.bench.reference_loop import ReferenceLoop
from llada_jax.config import ModelConfig
from llada_jax.decoding import SamplingParams

MICRO = dataclasses.replace(
    ModelConfig.from_name("counting"),
    hidden_size=16,
    intermediate_size=16,
    moe_intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    rotary_dim=4,
    num_experts=0,
)
ROW_KEYS = {
    "tokens_per_second",
    "forwards_per_second",
    "tokens_per_forward",
    "speedup_vs_reference_loop",
}


@pytest.fixture(scope="module")
def measured():
    said: list[str] = []
    result = bench.bench_decode(10, 20, (1, 2), 1, 2, config=MICRO, report=said.append)
    return result, said


def test_bench_decode_gives_the_documented_keys(measured):
    result, said = measured
    assert set(result) >= {"device", "batch"}
    assert set(result["batch"]) == {"1", "2"}
    for row in result["batch"].values():
        assert set(row) >= ROW_KEYS
        assert all(value > 0 for value in row.values())
        assert row["speedup_vs_reference_loop"] == pytest.approx(
            row["tokens_per_second"] / row["reference_tokens_per_second"]
        )
    assert any("reference loop" in line for line in said)


def test_bench_decode_prints_json_or_a_table(run, monkeypatch, measured):
    monkeypatch.setattr(bench, "bench_decode", lambda *args, **options: measured[0])
    code, out, err = run("bench", "decode", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == measured[0]
    code, out, _ = run("bench", "decode")
    assert code == 0
    assert "reference loop" in out


def test_bench_decode_fails_when_the_loops_disagree(monkeypatch):
    def wrong(self, prompt, new_tokens):
        return np.zeros(new_tokens, np.int32), 1

    monkeypatch.setattr(ReferenceLoop, "generate", wrong)
    with pytest.raises(bench.BenchError, match="cannot be compared"):
        bench.bench_decode(10, 20, (1,), 1, 1, config=MICRO)  # compiled by now


def test_widen_keeps_heads_layers_and_experts():
    config = ModelConfig.from_name("counting")
    wide = bench.widen(config, 4)
    assert (wide.hidden_size, wide.num_attention_heads, wide.head_dim) == (512, 4, 128)
    assert (wide.num_experts, wide.num_hidden_layers, wide.vocab_size) == (16, 3, 320)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams.speed(max_tokens=80),
        SamplingParams.quality(max_tokens=80),
        SamplingParams(threshold=0.95, editing_threshold=None, max_tokens=80),
    ],
    ids=["speed", "quality", "v20"],
)
def test_reference_loop_is_the_released_one(counting, params):
    model, weights = counting
    loop = ReferenceLoop(model, weights, params)
    prompt = [33, 39, 28, 33, 40, 28, 33, 41, 28, 34, 32, 28]
    tokens, forwards = loop.generate(prompt, 80)
    assert forwards == {0.5: 9, 0.7: 12, 0.95: 86}[params.threshold]
    assert "".join(chr(t + 16) for t in tokens).startswith("21,22,23,24,")


def test_bench_load_prints_json(run):
    code, out, err = run("bench", "load", "--gigabytes", "0.02", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["bytes"] > 1e7
