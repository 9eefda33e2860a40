"""One door for both layouts, and the way from one to the other."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.checkpoint import (
    CheckpointError,
    companion_files,
    convert,
    load_checkpoint,
    load_hf,
    read_source_config,
)
from llada_jax.parallel import make_mesh

from .synthetic import BF16, F16, F32, make_config, make_tensors, merge, read, same_bytes, write

COUNTING = Path(__file__).parent.parent / "golden" / "counting"


def test_counting_through_orbax_and_back(tmp_path):
    convert(COUNTING, tmp_path / "own", "orbax")
    convert(tmp_path / "own", tmp_path / "out", "hf")
    same_bytes(read(tmp_path / "out"), read(COUNTING))
    assert read_source_config(tmp_path / "out") == read_source_config(COUNTING)
    for folder in ("own", "out"):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / folder / name).read_bytes() == (COUNTING / name).read_bytes()


def test_mixed_precisions_through_every_layout(tmp_path):
    rng = np.random.default_rng(3)
    config = make_config(use_qkv_bias=True, first_k_dense_replace=0)
    tensors = make_tensors(config, lambda name: (BF16, F16, F32)[rng.integers(3)])
    write(tmp_path / "in", config, tensors, files=3)
    convert(tmp_path / "in", tmp_path / "own", "orbax")
    convert(tmp_path / "own", tmp_path / "own2", "orbax")
    convert(tmp_path / "own2", tmp_path / "out", "hf", max_shard_bytes=2000)
    same_bytes(read(tmp_path / "out"), tensors)


def test_merge_and_split(tmp_path):
    config = make_config()
    tensors = make_tensors(config, BF16)
    write(tmp_path / "in", config, tensors)
    convert(tmp_path / "in", tmp_path / "merged", merged_experts=True)
    same_bytes(read(tmp_path / "merged"), merge(config, tensors))
    assert read_source_config(tmp_path / "merged")["model_type"] == "llada2_moe_veomni"
    convert(tmp_path / "merged", tmp_path / "own", to="orbax")
    convert(tmp_path / "own", tmp_path / "out")
    same_bytes(read(tmp_path / "out"), tensors)
    assert read_source_config(tmp_path / "out") == read_source_config(tmp_path / "in")


def test_cast(tmp_path):
    config = make_config()
    tensors = make_tensors(config, F32)
    folder = write(tmp_path / "in", config, tensors)
    raw = config.to_hf() | {"dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(raw))
    convert(folder, tmp_path / "out", dtype="bfloat16")
    same_bytes(
        read(tmp_path / "out"),
        {n: t if ".mlp.gate." in n else t.astype(BF16) for n, t in tensors.items()},
    )
    assert read_source_config(tmp_path / "out") == raw | {"dtype": "bfloat16"}


def test_all_companion_files_travel(tmp_path):
    folder = write(tmp_path / "in", make_config(), make_tensors(make_config()))
    names = {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "tokenizer.model",
        "chat_template.jinja",
        "generation_config.json",
        "vocab.json",
        "merges.txt",
        "modeling_llada2_moe.py",
    }
    for name in names | {"optimizer.pt", "README.md"}:
        (folder / name).write_text(name)
    assert {f.name for f in companion_files(folder)} == names
    for to in ("hf", "orbax"):
        convert(folder, tmp_path / to, to)
        assert {f.name for f in companion_files(tmp_path / to)} == names
        assert not (tmp_path / to / "optimizer.pt").exists()


def test_load_checkpoint_takes_either(tmp_path):
    convert(COUNTING, tmp_path / "own", "orbax")
    mesh = make_mesh(expert=8)
    for folder in (COUNTING, tmp_path / "own"):
        config, params = load_checkpoint(folder, dtype=jnp.bfloat16, mesh=mesh)
        assert config == load_hf(COUNTING)[0]
        gate = params["moe_layers"]["moe"]["experts"]["gate"]
        assert gate.dtype == jnp.bfloat16
        assert len(gate.sharding.device_set) == 8
    a, b = (load_checkpoint(f)[1] for f in (COUNTING, tmp_path / "own"))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_wrong_arguments(tmp_path):
    with pytest.raises(CheckpointError, match="cannot convert to 'gguf'; use 'hf' or 'orbax'"):
        convert(COUNTING, tmp_path / "out", "gguf")
    with pytest.raises(CheckpointError, match="merged_experts is a Hugging Face layout"):
        convert(COUNTING, tmp_path / "out", "orbax", merged_experts=True)
    with pytest.raises(CheckpointError, match="exists already"):
        convert(COUNTING, COUNTING)
    with pytest.raises(CheckpointError, match="does not exist"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()
