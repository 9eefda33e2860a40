import dataclasses
import json

import numpy as np
import pytest

from llada_jax.checkpoint import CheckpointError, convert, read_source_config
from llada_jax.training.merge import MergeError, best_checkpoints, merge
from tests.checkpoint.synthetic import (
    BF16,
    F32,
    make_config,
    make_tensors,
    read,
    same_bytes,
    write,
)
from tests.checkpoint.synthetic import merge as merge_experts

CONFIG = make_config()


def checkpoint(folder, seed, dtype=F32, config=CONFIG):
    tensors = make_tensors(config, dtype, seed=seed)
    write(folder, config, tensors)
    return tensors


def test_mean_of_two_is_exact(tmp_path):
    a, b = (checkpoint(tmp_path / str(seed), seed) for seed in (0, 1))
    merge(tmp_path / "out", [tmp_path / "0", tmp_path / "1"])
    exact = {n: ((a[n].astype(np.float64) + b[n]) / 2).astype(np.float32) for n in a}
    same_bytes(read(tmp_path / "out"), exact)
    assert any("expert_bias" in name for name in exact)


def test_bfloat16_is_averaged_in_float32_and_rounded_once(tmp_path):
    tensors = [checkpoint(tmp_path / str(seed), seed, BF16) for seed in range(3)]
    merge(tmp_path / "out", [tmp_path / str(seed) for seed in range(3)])
    mean = {
        n: ((tensors[0][n].astype(F32) + tensors[1][n] + tensors[2][n]) / F32.type(3)).astype(BF16)
        for n in tensors[0]
    }
    same_bytes(read(tmp_path / "out"), mean)


@pytest.mark.parametrize("weights", [None, [0.3]])
def test_mean_of_one_keeps_every_byte(tmp_path, weights):
    rng = np.random.default_rng(3)
    tensors = checkpoint(tmp_path / "in", 0, lambda name: (BF16, F32)[rng.integers(2)])
    tensors["model.norm.weight"][:2] = -0.0
    write(tmp_path / "in", CONFIG, tensors)
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    merge(tmp_path / "out", [tmp_path / "in"], weights=weights)
    same_bytes(read(tmp_path / "out"), tensors)
    assert read_source_config(tmp_path / "out") == read_source_config(tmp_path / "in")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_weights_need_not_add_up_to_one(tmp_path):
    a, b = (checkpoint(tmp_path / str(seed), seed) for seed in (0, 1))
    merge(tmp_path / "out", [tmp_path / "0", tmp_path / "1"], weights=[1.0, 3.0])
    out = read(tmp_path / "out")
    for name in a:
        np.testing.assert_allclose(out[name], 0.25 * a[name] + 0.75 * b[name], rtol=0, atol=1e-6)


def test_layouts_may_be_mixed_and_the_first_decides(tmp_path):
    a, b = (checkpoint(tmp_path / str(seed), seed) for seed in (0, 1))
    mean = {name: (a[name] + b[name]) / 2 for name in a}
    convert(tmp_path / "0", tmp_path / "native", "orbax")
    convert(tmp_path / "0", tmp_path / "merged", "hf", merged_experts=True)
    for first, expected in (("native", mean), ("merged", merge_experts(CONFIG, mean))):
        merge(tmp_path / f"{first}-out", [tmp_path / first, tmp_path / "1"])
        same_bytes(read(tmp_path / f"{first}-out"), expected)


def test_the_field_that_differs_is_named(tmp_path):
    checkpoint(tmp_path / "a", 0)
    checkpoint(tmp_path / "b", 0, config=dataclasses.replace(CONFIG, rope_theta=1e4))
    with pytest.raises(MergeError, match=r"rope_theta is 600000.0 in .*a and 10000.0 in .*b"):
        merge(tmp_path / "out", [tmp_path / "a", tmp_path / "b"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("folders", "weights", "message"),
    [
        ([], None, "nothing to merge"),
        (["a", "a"], [1.0], "1 weights for 2 checkpoints"),
        (["a", "a"], [1.0, 0.0], "must be positive; leave out"),
        (["a", "a"], [1.0, float("nan")], "must be positive"),
    ],
)
def test_what_cannot_be_averaged(tmp_path, folders, weights, message):
    with pytest.raises(MergeError, match=message):
        merge(tmp_path / "out", folders, weights=weights)


def test_existing_folders_and_damaged_checkpoints(tmp_path):
    tensors = checkpoint(tmp_path / "a", 0)
    with pytest.raises(CheckpointError, match="exists already"):
        merge(tmp_path / "a", [tmp_path / "a"])
    tensors["model.norm.weight"][0] = np.nan
    write(tmp_path / "b", CONFIG, tensors)
    with pytest.raises(CheckpointError, match=r"b cannot be merged: .*nan"):
        merge(tmp_path / "out", [tmp_path / "a", tmp_path / "b"])
    assert not (tmp_path / "out").exists()


def validated(run, step, loss):
    folder = run / "best" / f"step_{step:06d}"
    folder.mkdir(parents=True)
    (folder / "validation.json").write_text(json.dumps({"step": step, "loss": loss}))
    return folder


def test_best_checkpoints(tmp_path):
    losses = {100: 3.0, 200: 2.0, 300: None, 400: 2.0, 1000: 2.5}
    folders = {step: validated(tmp_path, step, loss) for step, loss in losses.items()}
    (tmp_path / "best" / "half-written").mkdir()
    assert best_checkpoints(tmp_path, 3) == [folders[400], folders[200], folders[1000]]
    with pytest.raises(MergeError, match="holds 4 checkpoints with a validation loss, not 5"):
        best_checkpoints(tmp_path, 5)
    with pytest.raises(MergeError, match="at least 1"):
        best_checkpoints(tmp_path, 0)
    with pytest.raises(MergeError, match="does not exist; give the folder of a training run"):
        best_checkpoints(tmp_path / "best", 1)
    (folders[100] / "validation.json").write_text('{"loss": 1.0}')
    with pytest.raises(MergeError, match=r"must hold a step and a loss \(KeyError: 'step'\)"):
        best_checkpoints(tmp_path, 1)
