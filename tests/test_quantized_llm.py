"""Sampling with quantised weights, from Python and from the command line."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from llada_jax import LLM, SamplingParams
from llada_jax.checkpoint import CheckpointError
from llada_jax.cli import main
from llada_jax.parallel import make_mesh
from pallas_kernels.quantized import SCHEMES

PROMPT = "17,18,19,20,"
SPEED = SamplingParams.speed(max_tokens=40)
COUNTED = "".join(f"{n}," for n in range(21, 48))[:40]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The built-in model in int8, by the command line."""
    folder = tmp_path_factory.mktemp("quantised") / "int8"
    assert main(["convert", "counting", str(folder), "--to", "orbax", "--quantize", "int8"]) == 0
    return folder


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder)


def assert_same(first, second):
    """Equal to the token; probabilities may differ by rounding between batch shapes."""
    plain = [dataclasses.replace(g, confidences=(), trace=None) for g in (first, second)]
    assert plain[0] == plain[1]
    np.testing.assert_allclose(first.confidences, second.confidences, rtol=1e-4)


def test_int8_still_counts(llm):
    assert llm.quantization == "int8"
    first = llm.generate(PROMPT, SPEED)[0]
    assert first.text == COUNTED
    assert llm.generate(PROMPT, SPEED)[0] == first
    together = llm.generate(["5,10,", PROMPT, "2,4,6,"], SPEED)
    assert_same(together[1], first)


def test_on_load_as_from_the_folder(llm):
    loaded = LLM("counting", quantization="int8")
    assert loaded.quantization == "int8"
    jax.tree.map(np.testing.assert_array_equal, loaded.params, llm.params)


@pytest.mark.parametrize("scheme", ["fp8", "int4"])
def test_the_other_schemes_decode(scheme):
    llm = LLM("counting", quantization=scheme)
    first, second = (llm.generate(PROMPT, SPEED)[0] for _ in range(2))
    assert first == second
    assert first.num_tokens == 40


def test_on_a_mesh(folder, llm):
    spread = LLM(folder, mesh=make_mesh(expert=4, tensor=2))
    assert spread.generate(PROMPT, SPEED)[0].text == llm.generate(PROMPT, SPEED)[0].text


def test_errors(folder):
    with pytest.raises(ValueError, match="'int3' is none of int8, fp8, int4"):
        LLM("counting", quantization="int3")
    with pytest.raises(CheckpointError, match="holds int8 weights, which cannot become fp8"):
        LLM(folder, quantization="fp8")
    assert LLM(folder, quantization="int8").quantization == "int8"


def run(capsys, *arguments):
    capsys.readouterr()
    code = main(list(map(str, arguments)))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_verify(capsys, folder):
    common = "verify", "counting", "--json", "--tokens", "64"
    code, out, _ = run(capsys, *common[:2], folder, *common[2:])
    stored = json.loads(out)
    assert code == 0
    assert 0 < stored["mean_kl"] < 0.015
    assert stored["top1"] > 0.9
    assert len(stored["layer_drift"]) == 3
    code, out, _ = run(capsys, *common[:2], "counting", *common[2:], "--quantization", "int8")
    assert code == 0
    assert json.loads(out) == stored


def test_generate(capsys):
    arguments = "generate", PROMPT, "--model", "counting", "--quantization", "int8"
    code, out, _ = run(capsys, *arguments, "--mode", "speed", "--max-tokens", "40")
    assert (code, out.strip()) == (0, COUNTED)
    code, _, err = run(capsys, "generate", PROMPT, "--quantization", "int3")
    assert code != 0
    assert "int8" in err


def test_info_lists_sizes(capsys):
    code, out, _ = run(capsys, "info", "mini", "--json")
    assert code == 0
    sizes = json.loads(out)["bytes"]
    assert list(sizes) == ["bfloat16", *SCHEMES]
    assert 16.6e9 < sizes["int8"] < sizes["fp8"] < 17e9
    assert 9.2e9 < sizes["int4"] < 9.4e9


def test_no_export_and_no_training(capsys, folder, tmp_path):
    code, _, err = run(capsys, "convert", folder, tmp_path / "hf", "--to", "hf")
    assert code != 0
    assert "holds int8 weights, which the Hugging Face layout has no place for" in err
    code, _, err = run(
        capsys, "convert", "counting", tmp_path / "hf", "--to", "hf", "--quantize", "fp8"
    )
    assert code != 0
    assert "use to='orbax'" in err
    code, _, err = run(
        capsys, "train", "sft", f"model.model_path={folder}", "data.train_path=chats.jsonl"
    )
    assert code != 0
    assert "holds int8 weights, which are for inference only" in err
    code, _, err = run(capsys, "merge", tmp_path / "mean", folder, folder)
    assert code != 0
    assert "cannot be averaged" in err
