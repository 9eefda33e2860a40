"""Every way in which a folder can be wrong has its own message."""

import json

import numpy as np
import pytest

from llada_jax.checkpoint import CheckpointError, load_checkpoint, load_hf
from llada_jax.checkpoint.safetensors_io import Reader

from .synthetic import make_config, make_tensors, merge, write

CONFIG = make_config()
INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def nothing_is_read(monkeypatch):
    """All of these are found in the headers, before any weight is read."""

    def refuse(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(Reader, "read_rows", refuse)


def fails(folder, *parts, **kwargs):
    with pytest.raises(CheckpointError) as caught:
        load_hf(folder, **kwargs)
    for part in parts:
        assert part in str(caught.value)


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def test_missing_tensor(tmp_path):
    tensors = make_tensors(CONFIG)
    del tensors["model.layers.1.mlp.gate.expert_bias"]
    folder = write(tmp_path / "m", CONFIG, tensors)
    fails(folder, "lacks 1 of", "model.layers.1.mlp.gate.expert_bias", "incomplete")


def test_many_missing_tensors_are_counted(tmp_path):
    tensors = {n: t for n, t in make_tensors(CONFIG).items() if ".experts." not in n}
    folder = write(tmp_path / "m", CONFIG, tensors)
    fails(folder, "lacks 48 of", "model.layers.1.mlp.experts.0.down_proj.weight", ", …")


def test_mixed_expert_layouts(tmp_path):
    tensors = make_tensors(CONFIG)
    tensors |= {n: t for n, t in merge(CONFIG, tensors).items() if "layers.1" in n}
    folder = write(tmp_path / "m", CONFIG, tensors)
    fails(folder, "lacks 3 of", "model.layers.2.mlp.experts.down_proj")


def test_unexpected_tensor(tmp_path):
    tensors = make_tensors(CONFIG) | {"model.mtp.weight": np.zeros(3, np.float32)}
    fails(
        write(tmp_path / "m", CONFIG, tensors), "model.mtp.weight (model.safetensors)", "no place"
    )


def test_unexpected_tensor_outside_the_index(tmp_path):
    tensors = make_tensors(CONFIG) | {"extra": np.zeros(3, np.float32)}
    folder = write(tmp_path / "m", CONFIG, tensors, files=2)
    edit_index(folder, lambda index: index["weight_map"].pop("extra"))
    fails(folder, "extra (model-", "no place")


def test_bias_without_its_flag(tmp_path):
    other = make_config(use_qkv_bias=True)
    folder = write(tmp_path / "m", CONFIG, make_tensors(other))
    fails(folder, "attention.query_key_value.bias", "no place")


def test_mis_shaped_tensor(tmp_path):
    tensors = make_tensors(CONFIG)
    tensors["model.norm.weight"] = np.zeros(15, np.float32)
    folder = write(tmp_path / "m", CONFIG, tensors)
    fails(folder, "model.norm.weight in ", "model.safetensors has shape [15]", "asks for [16]")


def test_truncated_file(tmp_path):
    folder = write(tmp_path / "m", CONFIG, make_tensors(CONFIG), files=2)
    file = folder / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    fails(folder, file.name, "truncated", "fetch it again")


def test_garbage_file(tmp_path):
    folder = write(tmp_path / "m", CONFIG, make_tensors(CONFIG))
    (folder / "model.safetensors").write_bytes(b"\x10" + bytes(7) + b"?" * 16)
    fails(folder, "model.safetensors", "damaged header")


def test_index_names_a_file_that_is_not_there(tmp_path):
    folder = write(tmp_path / "m", CONFIG, make_tensors(CONFIG), files=2)
    (folder / "model-00000-of-00002.safetensors").unlink()
    fails(folder, INDEX, "names model-00000-of-00002.safetensors", "not in the folder")


def test_index_names_a_file_elsewhere(tmp_path):
    folder = write(tmp_path / "m", CONFIG, make_tensors(CONFIG), files=2)
    edit_index(folder, lambda i: i["weight_map"].update({"lm_head.weight": "../other.safetensors"}))
    fails(folder, INDEX, "not a file of its folder")


def test_index_and_file_contradict_each_other(tmp_path):
    folder = write(tmp_path / "m", CONFIG, make_tensors(CONFIG), files=2)
    edit_index(
        folder, lambda i: i["weight_map"].update({"ghost": i["weight_map"]["lm_head.weight"]})
    )
    fails(folder, INDEX, "ghost is in model-", "but it is not")


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}']
)
def test_damaged_index(tmp_path, text):
    folder = write(tmp_path / "m", CONFIG, make_tensors(CONFIG), files=2)
    (folder / INDEX).write_text(text)
    fails(folder, INDEX)


def test_one_tensor_in_two_files(tmp_path):
    folder = write(tmp_path / "m", CONFIG, make_tensors(CONFIG), files=2)
    (folder / INDEX).unlink()
    (folder / "copy.safetensors").write_bytes(
        (folder / "model-00000-of-00002.safetensors").read_bytes()
    )
    fails(folder, "is both in", "copy.safetensors", "remove one of the files")


def test_another_architecture(tmp_path):
    folder = write(tmp_path / "m", CONFIG, make_tensors(CONFIG))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    fails(folder, "config.json", "model_type = 'llama'", "llada2_moe")


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_damaged_config(tmp_path, text):
    folder = write(tmp_path / "m", CONFIG, make_tensors(CONFIG))
    (folder / "config.json").write_text(text)
    fails(folder, "config.json")


def test_no_config(tmp_path):
    folder = write(tmp_path / "m", CONFIG, make_tensors(CONFIG))
    (folder / "config.json").unlink()
    fails(folder, "config.json does not exist")


def test_unsupported_storage(tmp_path):
    tensors = make_tensors(CONFIG)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float64)
    folder = write(tmp_path / "m", CONFIG, tensors)
    fails(folder, "model.norm.weight in ", "stored as F64", "BF16, F16, F32")


def test_no_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    fails(tmp_path, "no *.safetensors file in", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        load_checkpoint(tmp_path)


def test_no_folder(tmp_path):
    fails(tmp_path / "nowhere", "nowhere does not exist")
