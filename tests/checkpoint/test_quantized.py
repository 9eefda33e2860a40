"""Quantised weights in files: quantised on load, saved, loaded again bit by bit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from llada_jax.checkpoint import (
    CheckpointError,
    convert,
    load_checkpoint,
    load_hf,
    load_native,
    save_hf,
    save_native,
    stored_dtypes,
    stored_quantization,
)
from llada_jax.model import dequantize_params, quantization_of, quantize_params
from llada_jax.parallel import make_mesh
from llada_jax.training.merge import MergeError, merge
from pallas_kernels.quantized import SCHEMES, QuantizedMatrix

from .synthetic import BF16, F32, make_config, make_tensors, write

CONFIG = make_config(
    use_bias=True,
    use_qkv_bias=True,
    hidden_size=32,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    first_k_dense_replace=0,
)
MESH = {"expert": 4, "tensor": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tensors = make_tensors(CONFIG, lambda n: F32 if ".mlp.gate." in n else BF16)
    return write(tmp_path_factory.mktemp("quantised") / "in", CONFIG, tensors, files=2)


@pytest.fixture(scope="module")
def quantised(folder):
    """What every way of loading must give."""
    params = load_hf(folder)[1]
    return {scheme: quantize_params(params, CONFIG, scheme) for scheme in SCHEMES}


@pytest.fixture(scope="module")
def saved(folder, quantised):
    for scheme, params in quantised.items():
        save_native(folder.parent / scheme, CONFIG, params)
    return {scheme: folder.parent / scheme for scheme in SCHEMES}


def assert_same(found, expected):
    """Equal bit by bit, types and schemes too."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for a, b in pairs:
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantised_while_read(folder, quantised, scheme):
    config, params = load_hf(folder, quantization=scheme)
    assert config == CONFIG
    assert_same(params, quantised[scheme])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_saved_and_loaded(saved, quantised, scheme):
    assert stored_quantization(saved[scheme]) == scheme
    for asked in (None, scheme):
        _, params = load_native(saved[scheme], quantization=asked)
        assert_same(params, quantised[scheme])
    stored = stored_dtypes(saved[scheme])
    assert stored["model.word_embeddings.weight"] == BF16
    assert "model.layers.0.mlp.experts.0.up_proj.weight" not in stored


@pytest.mark.parametrize(
    ("scheme", "sizes"), [*((scheme, MESH) for scheme in SCHEMES), ("fp8", {"fsdp": 8})]
)
def test_onto_a_mesh(folder, saved, quantised, scheme, sizes):
    mesh = make_mesh(**sizes)
    loaded = [
        load_native(saved[scheme], mesh=mesh),
        load_hf(folder, quantization=scheme, mesh=mesh),
    ]
    for _, params in loaded:
        assert_same(params, quantised[scheme])
        for leaf in jax.tree.leaves(params):
            assert leaf.sharding.mesh == mesh
        gate = params["moe_layers"]["moe"]["experts"]["gate"]
        for array in (gate.values, gate.scales):
            shard = array.addressable_shards[0].data
            assert array.shape[1] == shard.shape[1] * sizes.get("expert", 1)
    save_native(folder.parent / f"{scheme}-{'-'.join(sizes)}", *loaded[1])
    again = load_native(folder.parent / f"{scheme}-{'-'.join(sizes)}")
    assert_same(again[1], quantised[scheme])


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_dtype_changes_the_other_weights_only(folder, quantised, tmp_path, to):
    convert(folder, tmp_path / "plain", to)
    _, params = load_checkpoint(tmp_path / "plain", dtype=jnp.float32, quantization="int8")
    assert params["embed"]["embedding"].dtype == jnp.float32
    for path, weight in traverse_util.flatten_dict(params, sep="/").items():
        if isinstance(weight, QuantizedMatrix):
            expected = traverse_util.flatten_dict(quantised["int8"], sep="/")[path]
            assert_same(weight, expected)


@pytest.mark.parametrize("axes", [None, MESH])
def test_quantised_while_restored(folder, quantised, tmp_path, axes):
    convert(folder, tmp_path / "own", "orbax")
    mesh = None if axes is None else make_mesh(**axes)
    for scheme in SCHEMES if mesh is None else ["int4"]:
        _, params = load_native(tmp_path / "own", quantization=scheme, mesh=mesh)
        assert_same(params, quantised[scheme])


def test_convert(folder, quantised, tmp_path):
    convert(folder, tmp_path / "int4", "orbax", quantization="int4")
    assert_same(load_checkpoint(tmp_path / "int4")[1], quantised["int4"])
    convert(tmp_path / "int4", tmp_path / "copy", "orbax", quantization="int4")
    assert_same(load_checkpoint(tmp_path / "copy")[1], quantised["int4"])
    with pytest.raises(CheckpointError, match="no place for int8 weights; use to='orbax'"):
        convert(folder, tmp_path / "out", "hf", quantization="int8")
    with pytest.raises(CheckpointError, match=r"holds int4 weights, .* that they were made from"):
        convert(tmp_path / "int4", tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()


def test_export_by_hand(quantised, tmp_path):
    with pytest.raises(CheckpointError, match=r"quantised \(fp8\).*dequantize_params"):
        save_hf(tmp_path / "out", CONFIG, quantised["fp8"])
    plain = dequantize_params(quantised["fp8"], CONFIG)
    save_hf(tmp_path / "out", CONFIG, plain)
    assert_same(load_hf(tmp_path / "out")[1], plain)


def test_another_scheme(saved):
    with pytest.raises(CheckpointError, match="holds int8 weights, which cannot become int4"):
        load_native(saved["int8"], quantization="int4")


def test_unknown_scheme(folder, saved):
    for place in (folder, saved["int8"]):
        with pytest.raises(ValueError, match="'int5' is none of int8, fp8, int4"):
            load_checkpoint(place, quantization="int5")


def test_not_averaged(saved, tmp_path):
    with pytest.raises(MergeError, match="int8 holds int8 weights, which cannot be averaged"):
        merge(tmp_path / "mean", [saved["int8"], saved["int8"]])


def test_part_of_the_layers(quantised, tmp_path):
    params = dict(quantised["int8"])
    params["lm_head"] = dequantize_params(params, CONFIG)["lm_head"]
    with pytest.raises(CheckpointError, match="is of scheme None, not int8"):
        save_native(tmp_path / "out", CONFIG, params)


def test_not_finite(folder, quantised, tmp_path):
    params = jax.tree.map(lambda a: a, quantised["int8"])
    bad = params["moe_layers"]["moe"]["experts"]["up"]
    scales = bad.scales.at[1, 3, 0, 0].set(jnp.nan)
    params["moe_layers"]["moe"]["experts"]["up"] = QuantizedMatrix(
        bad.values, scales, bad.scheme, bad.rows
    )
    save_native(tmp_path / "out", CONFIG, params)
    with pytest.raises(CheckpointError, match=r"experts/up\[1, 3\]"):
        load_native(tmp_path / "out")
    plain = load_hf(folder)[1]
    plain["moe_layers"]["attention"]["out"]["kernel"] *= jnp.inf
    save_native(tmp_path / "plain", CONFIG, plain)
    with pytest.raises(CheckpointError, match="holds NaN or infinity"):
        load_native(tmp_path / "plain", quantization="int8")


def test_marker_of_a_later_scheme(saved, tmp_path):
    marker = saved["int8"] / "llada_jax.json"
    text = marker.read_text()
    try:
        marker.write_text(json.dumps(json.loads(text) | {"quantization": "int2"}))
        with pytest.raises(CheckpointError, match="is damaged"):
            load_native(saved["int8"])
    finally:
        marker.write_text(text)


def test_tree_says_how_it_is_quantised(quantised):
    assert {scheme: quantization_of(params) for scheme, params in quantised.items()} == {
        scheme: scheme for scheme in SCHEMES
    }
