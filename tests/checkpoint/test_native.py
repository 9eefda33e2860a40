"""Our own layout: orbax behind one file."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from llada_jax.checkpoint import (
    CheckpointError,
    is_native,
    load_hf,
    load_native,
    read_source_config,
    save_hf,
    save_native,
    stored_dtypes,
)
from llada_jax.model.weights import flatten_specs, weight_specs
from llada_jax.parallel import make_mesh, named_sharding

from .synthetic import BF16, F16, F32, make_config, make_tensors, read, same_bytes, twin, write


@pytest.fixture
def tensors():
    return make_tensors(make_config(), lambda n: F32 if n.endswith("expert_bias") else BF16)


@pytest.fixture
def loaded(tmp_path, tensors):
    return load_hf(write(tmp_path / "in", make_config(), tensors))


def assert_same(found, expected):
    found = traverse_util.flatten_dict(found, sep="/")
    expected = traverse_util.flatten_dict(expected, sep="/")
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(
            np.asarray(found[path]), np.asarray(value), err_msg=path, strict=True
        )


def test_round_trip(tmp_path, loaded):
    save_native(tmp_path / "out", *loaded)
    assert is_native(tmp_path / "out")
    assert not is_native(tmp_path / "in")
    config, params = load_native(tmp_path / "out")
    assert config == loaded[0]
    assert_same(params, loaded[1])


def test_restores_onto_other_meshes(tmp_path, tensors):
    config = make_config()
    folder = write(tmp_path / "in", config, tensors)
    _, params = load_hf(folder, mesh=make_mesh(fsdp=2, expert=4))
    save_native(tmp_path / "out", config, params)
    for sizes in ({"expert": 4, "tensor": 2}, {"fsdp": 8}):
        mesh = make_mesh(**sizes)
        _, again = load_native(tmp_path / "out", mesh=mesh)
        flat = traverse_util.flatten_dict(again, sep="/")
        for path, spec in flatten_specs(weight_specs(config)).items():
            assert flat[path].sharding == named_sharding(spec.axes, spec.shape, mesh)
            np.testing.assert_array_equal(np.asarray(flat[path]), twin(config, tensors)[path])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_cast_is_that_of_the_import(tmp_path, loaded, dtype):
    save_native(tmp_path / "out", *loaded)
    _, expected = load_hf(tmp_path / "in", dtype=dtype)
    _, found = load_native(tmp_path / "out", dtype=dtype)
    assert_same(found, expected)
    assert found["moe_layers"]["moe"]["router"]["kernel"].dtype == jnp.bfloat16


def test_precision_of_each_tensor_survives(tmp_path):
    rng = np.random.default_rng(1)
    config = make_config(use_bias=True, use_qkv_bias=True)
    tensors = make_tensors(config, lambda name: (BF16, F16, F32)[rng.integers(3)])
    folder = write(tmp_path / "in", config, tensors)
    _, params = load_hf(folder)
    source = read_source_config(folder)
    save_native(
        tmp_path / "own", config, params, source_config=source, dtypes=stored_dtypes(folder)
    )
    assert stored_dtypes(tmp_path / "own") == stored_dtypes(folder)
    assert stored_dtypes(folder) == {name: t.dtype for name, t in tensors.items()}
    _, again = load_native(tmp_path / "own")
    save_hf(tmp_path / "out", config, again, dtypes=stored_dtypes(tmp_path / "own"))
    same_bytes(read(tmp_path / "out"), tensors)


def test_nothing_is_noted_where_layers_are_alike(tmp_path, loaded):
    save_native(tmp_path / "out", *loaded, dtypes=stored_dtypes(tmp_path / "in"))
    assert json.loads((tmp_path / "out" / "llada_jax.json").read_text())["tensors"] == {}


def test_nothing_is_overwritten(tmp_path, loaded):
    save_native(tmp_path / "out", *loaded)
    with pytest.raises(CheckpointError, match="exists already"):
        save_native(tmp_path / "out", *loaded)
    load_native(tmp_path / "out")


def test_failure_leaves_nothing_behind(tmp_path, loaded):
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_native(tmp_path / "out", *loaded, extra_files=[tmp_path / "no-such-file"])
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_not_finite(tmp_path, loaded):
    config, params = loaded
    bad = params["moe_layers"]["moe"]["experts"]
    bad["down"] = bad["down"].at[1, 5, 0, 0].set(jnp.nan)
    save_native(tmp_path / "out", config, params)
    with pytest.raises(
        CheckpointError, match=r"experts/down\[1, 5\] \(model\.layers\.2\.mlp\.experts\.5\.down"
    ):
        load_native(tmp_path / "out")
    _, params = load_native(tmp_path / "out", check_finite=False)
    assert jnp.isnan(params["moe_layers"]["moe"]["experts"]["down"][1, 5, 0, 0])


@pytest.fixture
def saved(tmp_path, loaded):
    save_native(tmp_path / "out", *loaded)
    return tmp_path / "out"


def change_config(folder, **changes):
    raw = read_source_config(folder) | changes
    (folder / "config.json").write_text(json.dumps(raw))


def test_config_of_another_model(saved):
    change_config(saved, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match="differ in lm_head/kernel"):
        load_native(saved)


def test_config_of_another_size(saved):
    change_config(saved, vocab_size=128)
    with pytest.raises(CheckpointError, match=r"embed/embedding .* shape \(64, 16\).*\(128, 16\)"):
        load_native(saved)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax
def test_damaged_weights(saved):
    for file in (saved / "params").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(CheckpointError, match="cannot be restored"):
        load_native(saved)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax
def test_missing_weights(saved):
    shutil.rmtree(saved / "params")
    with pytest.raises(CheckpointError, match="cannot be restored"):
        load_native(saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ('{"format": "llada_jax", "version": 99}', "update it"),
        ('{"format": "other"}', "format 'other'"),
        ('{"format": "llada_jax", "version": 1}', "is damaged"),
        (
            '{"format": "llada_jax", "version": 1, "weights": {"a": "int3"}, "tensors": {}}',
            "is damaged",
        ),
    ],
)
def test_damaged_marker(saved, text, message):
    (saved / "llada_jax.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load_native(saved)


def test_not_a_native_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"llada_jax\.json does not exist"):
        load_native(tmp_path)


def test_default_device_is_respected(saved):
    device = jax.devices()[3]
    with jax.default_device(device):
        _, params = load_native(saved)
    assert {d for a in jax.tree.leaves(params) for d in a.devices()} == {device}
