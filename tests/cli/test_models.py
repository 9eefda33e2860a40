import json

import numpy as np
import pytest

from llada_jax.cli.verify import masked_rows, random_rows
from llada_jax.config import ModelConfig


@pytest.mark.parametrize(
    ("name", "total", "size"),
    [("mini", 16_255_638_528, 32_511_296_512), ("flash", 102_889_697_280, 205_779_426_304)],
)
def test_info_counts_without_allocating(run, name, total, size):
    code, out, err = run("info", name, "--json")
    assert (code, err) == (0, "")
    described = json.loads(out)
    assert described["parameters"]["total"] == total
    assert described["bytes"]["bfloat16"] == size  # of mini: total_size in the released index
    assert described["layers"]["dense"] == 1


def test_info_of_a_folder_as_a_table(run, golden):
    code, out, err = run("info", str(golden))
    assert (code, err) == (0, "")
    assert "16, 4 a token from 2 of 4 groups, 1 shared" in out


def test_convert_there_and_back_and_verify(run, tmp_path):
    native, back, half = (str(tmp_path / name) for name in ("native", "back", "half"))
    assert run("convert", "counting", native, "--to", "orbax")[0] == 0
    assert run("convert", native, back, "--to", "hf", "--merged-experts")[0] == 0
    code, out, err = run("verify", "counting", back, "--json", "--tokens", "70")
    assert (code, err) == (0, "")
    same = json.loads(out)
    assert same["agrees"] is True
    assert (same["positions"], same["mean_kl"], same["top1"], same["top5"]) == (70, 0, 1, 1)
    assert same["layer_drift"] == [0, 0, 0]
    assert run("convert", "counting", half, "--to", "hf", "--dtype", "bfloat16")[0] == 0
    options = ("--dtype", "float32", "--tokens", "70")
    code, out, _ = run("verify", "counting", half, *options)
    assert code == 0
    assert "drift after layer 2" in out
    assert run("verify", "counting", half, *options, "--max-kl", "1e-12")[0] == 1


def test_verify_on_texts(run, tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("17,18,19,20,\n\n1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,\n")
    code, out, _ = run("verify", "counting", "counting", "--prompt-file", str(file), "--json")
    assert code == 0
    assert json.loads(out)["positions"] == 12 + 45


def test_rows_end_like_a_draft():
    rows = masked_rows([[1] * 40, [2] * 3], 9, np.random.default_rng(0))
    assert rows.tokens.shape == (2, 64)
    assert rows.compared.sum(-1).tolist() == [40, 3]
    assert (rows.tokens[~rows.compared] == 9).all()
    masked = (rows.tokens[0, :40] == 9).mean()
    assert 0.1 < masked < 0.6


def test_random_rows_hold_as_many_tokens_as_asked_for():
    config = ModelConfig.from_name("counting")
    rows = random_rows(config, 300, np.random.default_rng(0))
    assert rows.compared.sum() == 300
    assert rows.tokens.max() < config.vocab_size
