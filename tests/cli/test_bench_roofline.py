"""The roofline sums, against figures worked out by hand."""

import json

import pytest

from llada_jax import ModelConfig
from llada_jax.bench import roofline
from llada_jax.cli import main
from pallas_kernels.chips import CHIPS

MINI = ModelConfig.from_name("mini")


def test_touched_experts():
    assert roofline.touched_experts(MINI, 0) == 0
    assert roofline.touched_experts(MINI, 1) == pytest.approx(8)
    assert roofline.touched_experts(MINI, 32) == pytest.approx(163.3, abs=0.1)
    assert roofline.touched_experts(MINI, 10_000) == pytest.approx(256)


def test_the_recorded_limits():
    """20.8 GB in bfloat16, 10.4 in int8, and what follows for v5p and v6e."""
    bf16 = roofline.work(MINI, 1, 32, 0)
    int8 = roofline.work(MINI, 1, 32, 0, "int8")
    assert bf16.weight_bytes == pytest.approx(20.8e9, rel=0.02)
    assert int8.weight_bytes == pytest.approx(10.4e9, rel=0.04)  # + scales
    assert CHIPS["v5p"].bandwidth / bf16.weight_bytes == pytest.approx(133, rel=0.02)
    assert CHIPS["v6e"].bandwidth / int8.weight_bytes == pytest.approx(158, rel=0.04)


def test_bytes_and_flops_by_hand():
    bf16 = roofline.work(MINI, 2, 32, 1000)
    tokens, d, f, e, layers = 64, 2048, 512, 256, 19
    attention = 20 * d * 128 * (16 + 4 + 4 + 16)
    dense = 3 * d * 5120
    shared = layers * 3 * d * f
    router = layers * d * e
    head = d * 157184
    norms = 20 * (2 * d + 2 * 128) + d
    experts = layers * 3 * d * f
    touched = roofline.touched_experts(MINI, tokens)
    weights = 2 * (attention + dense + shared + head + norms + experts * touched)
    weights += 4 * (router + layers * e) + 2 * tokens * d
    assert bf16.weight_bytes == pytest.approx(weights, abs=2)
    assert bf16.cache_bytes == 2 * 1032 * 20 * 2 * 4 * 128 * 2
    products = attention + dense + shared + router + head + experts * 8 + norms + layers * e
    assert bf16.flops == 2 * tokens * products + 4 * tokens * 2048 * 1032 * 20


def test_rows():
    rows = roofline.bench_roofline(batches=(1, 32))
    assert len(rows) == 4 * 4 * 2
    found = {(r["chip"], r["weights"], r["batch"]): r["arithmetic"] for r in rows}
    assert not found["v5e", "bfloat16", 1]["fits"]
    assert not found["v5e", "int8", 1]["fits"]
    assert found["v5e", "int4", 1]["fits"]
    assert found["v6e", "int8", 1]["fits"]
    assert {r["arithmetic"]["bound"] for r in rows if r["batch"] == 1} == {"memory"}
    one = found["v5p", "bfloat16", 1]
    assert one["tokens_per_second"]["speed"] == pytest.approx(5.34 * one["forwards_per_second"])
    many = found["v5p", "bfloat16", 32]
    assert many["tokens_per_second"]["speed"] == pytest.approx(
        32 * 5.34 * many["forwards_per_second"]
    )
    assert all(r["compiler"] is None for r in rows)


def test_compiler_figures():
    entry = {"chip": "v5e", "shape": "mini 8 rows", "bundles": 1.5e6, "hbm_bytes": 819e6}
    names = "block_decode_attention", "expert_mlp", "confidence_head"
    kernels = [entry | {"kernel": name} for name in names]
    rows = roofline.bench_roofline(
        batches=(8,), schemes=("bfloat16",), chips=("v5e", "v5p"), kernels=kernels
    )
    assert rows[0]["compiler"] == pytest.approx(
        {"issue_seconds": 0.040, "copy_seconds": 0.040, "bound_seconds": 0.040}
    )
    assert rows[1]["compiler"] is None


def test_command(capsys):
    assert main(["bench", "roofline", "--json", "--batch", "1"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["chip"] for row in rows} == set(CHIPS)
    assert main(["bench", "roofline", "--batch", "1", "--markdown"]) == 0
    assert "| v5p | bfloat16 | 1 |" in capsys.readouterr().out
