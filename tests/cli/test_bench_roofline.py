"""The roofline sums, against figures worked out by hand."""

import json
import pathlib

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


def call(kernel, weights="int4", rows=8, bundles=1.5e6, hbm_bytes=819e6, **more):
    """On v5e a bundle each 1 / 1.5e9 s and a byte each 1 / 819e9 s."""
    entry = {"chip": "v5e", "model": "mini", "kernel": kernel, "weights": weights, "rows": rows}
    return entry | {"bundles": bundles, "hbm_bytes": hbm_bytes} | more


def v5e(kernels, scheme="int4", batch=8):
    """One row: what arithmetic says, what the compiler says."""
    (row,) = roofline.bench_roofline(
        batches=(batch,), schemes=(scheme,), chips=("v5e",), kernels=kernels
    )
    return row["arithmetic"], row["compiler"]


def test_bundles_that_take_longer_than_the_bytes():
    """int4's head is int8. 19 layers of 2 ms and a head of 1 ms, against 11 ms for the bytes."""
    calls = [call("expert_mlp", bundles=3e6), call("confidence_head", "int8", hbm_bytes=1638e6)]
    limits, found = v5e(calls)
    assert found["kernels"] == ["confidence_head", "expert_mlp"]
    assert found["issue_seconds"] == pytest.approx(0.039)
    assert found["copy_seconds"] == pytest.approx(0.019 + 0.002)
    assert found["kernel_seconds"] == pytest.approx(0.038 + 0.002)
    # The rest: everything but 8 experts a token and the head.
    tokens, experts, head = 256, 19 * 8 * 3 * 2048 * 512, 2048 * 157184
    rest = (limits["flops"] - 2 * tokens * (experts + head)) / CHIPS["v5e"].bf16_flops
    assert found["rest_seconds"] == pytest.approx(rest)
    assert found["bound"] == "bundles"
    assert found["forwards_per_second"] == pytest.approx(1 / (0.039 + rest))
    assert found["forwards_per_second"] < limits["forwards_per_second"]


def test_bytes_that_take_longer_than_the_bundles():
    calls = [call("expert_mlp", bundles=1.5e5), call("confidence_head", "int8", bundles=1)]
    limits, found = v5e(calls)
    assert found["bound"] == "memory"
    assert found["forwards_per_second"] == pytest.approx(limits["forwards_per_second"])


def test_attention_counts_where_it_was_compiled():
    calls = [call("expert_mlp"), call("confidence_head", "int8")]
    attention = call("block_decode_attention", "bfloat16", cache_length=1024)
    without, found = v5e(calls)[1], v5e([*calls, attention])[1]
    assert found["issue_seconds"] == pytest.approx(without["issue_seconds"] + 20 * 0.001)
    products = 4 * 256 * 2048 * 1056 * 20 / CHIPS["v5e"].bf16_flops
    assert found["rest_seconds"] == pytest.approx(without["rest_seconds"] - products)
    assert v5e([*calls, attention | {"cache_length": 4096}])[1] == without


def test_calls_must_fit_the_row():
    calls = [call("expert_mlp", "fp8"), call("confidence_head", "bfloat16")]
    assert v5e(calls, "fp8")[1] is not None  # fp8 leaves the head alone
    assert v5e(calls, "int8")[1] is None
    assert v5e(calls, "fp8", batch=1)[1] is None
    assert v5e(calls[:1], "fp8")[1] is None


def test_a_report_without_calls(tmp_path, capsys):
    file = tmp_path / "kernels.json"
    file.write_text(json.dumps([{"kernel": "expert_mlp", "chip": "v5e", "bundles": 1}]))
    assert main(["bench", "roofline", "--kernels", str(file)]) == 2
    assert "holds no calls" in capsys.readouterr().err


def test_the_recorded_calls(capsys):
    """docs/kernels.json has a figure for every row, and docs/kernels.md shows them."""
    docs = pathlib.Path(__file__).parents[2] / "docs"
    command = ["bench", "roofline", "--markdown", "--kernels", str(docs / "kernels.json")]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert shown in (docs / "kernels.md").read_text()
    rows = roofline.bench_roofline(kernels=json.loads((docs / "kernels.json").read_text()))
    assert all(row["compiler"] is not None for row in rows)
    for row in rows:  # the bytes that the kernels count are part of those of the forward
        assert row["compiler"]["copy_seconds"] < 1.02 * row["arithmetic"]["memory_seconds"]


def test_command(capsys):
    assert main(["bench", "roofline", "--json", "--batch", "1"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["chip"] for row in rows} == set(CHIPS)
    assert main(["bench", "roofline", "--batch", "1", "--markdown"]) == 0
    assert "| v5p | bfloat16 | 1 |" in capsys.readouterr().out
