"""Quantised weights in the model: what is quantised, what they mean, what they cost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_jax.config import ModelConfig
from llada_jax.model import (
    LLaDA2,
    dequantize_params,
    flatten_specs,
    quantization_of,
    quantize_params,
    weight_bytes,
    weight_specs,
)
from llada_jax.model.layers import contract
from llada_jax.model.quantization import weight_scheme
from llada_jax.model.weights import Fold
from llada_jax.parallel import make_mesh, named_sharding
from pallas_kernels.quantized import SCHEMES, QuantizedMatrix, dequantize, quantize

from ..checkpoint.synthetic import VARIANTS, make_config

CONFIGS = {name: make_config(**changes) for name, changes in VARIANTS.items()}


def make_params(config):
    rng = np.random.default_rng(0)
    weights = {
        path: jnp.asarray(rng.normal(0, 0.2, spec.shape), jnp.float32)
        for path, spec in flatten_specs(weight_specs(config)).items()
    }
    return traverse_util.unflatten_dict(weights, sep="/")


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def bits(array):
    return np.asarray(array).view(np.uint8 if array.dtype.itemsize == 1 else np.uint32)


def forward(config, params, tokens, dtype=jnp.float32):
    model = LLaDA2(config, dtype=dtype)

    @jax.jit
    def run(params, tokens):
        out = model.apply({"params": params}, tokens)
        return model.apply({"params": params}, out.hidden, method="logits")

    return run(params, tokens)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_quantised(name, scheme):
    for path, spec in flatten_specs(weight_specs(CONFIGS[name])).items():
        is_matrix = "/attention/" in path or "mlp/" in path or "/experts/" in path
        is_matrix = (is_matrix or "/shared/" in path) and not path.endswith(("scale", "bias"))
        expected = scheme if is_matrix else None
        if path == "lm_head/kernel":
            expected = {"int8": "int8", "int4": "int8", "fp8": None}[scheme]
        assert weight_scheme(path, spec, scheme) == expected, path
        assert weight_scheme(path, spec, None) is None


@pytest.mark.parametrize("scheme", SCHEMES)
def test_layer_by_layer_is_as_all_at_once(scheme):
    config = CONFIGS["biases"]
    params = make_params(config)
    quantised = quantize_params(params, config, scheme)
    specs = flatten_specs(weight_specs(config))
    assert flat(quantised).keys() == specs.keys()
    for path, weight in flat(quantised).items():
        original, found = flat(params)[path], weight_scheme(path, specs[path], scheme)
        if found is None:
            assert weight is original
            continue
        if not path.endswith(
            ("attention/query/kernel", "out/kernel", "experts/down", "lm_head/kernel")
        ):
            continue  # the same again
        at_once = quantize(original.reshape(specs[path].fold.shape(original.shape)), found)
        assert (weight.scheme, weight.rows) == (found, at_once.rows)
        np.testing.assert_array_equal(bits(weight.values), bits(at_once.values), err_msg=path)
        np.testing.assert_array_equal(bits(weight.scales), bits(at_once.scales), err_msg=path)
    assert quantization_of(quantised) == scheme
    assert quantization_of(params) is None
    total = sum(a.nbytes for a in jax.tree.leaves(quantised))
    assert weight_bytes(config, scheme, jnp.float32) == total
    assert weight_bytes(config, None, jnp.float32) == sum(a.nbytes for a in jax.tree.leaves(params))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["biases", "dense", "tied"])
def test_forward_is_that_of_the_dequantised_weights(name, scheme):
    config = CONFIGS[name]
    params = make_params(config)
    quantised = quantize_params(params, config, scheme)
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, config.vocab_size)
    found = forward(config, quantised, tokens)
    expected = forward(config, dequantize_params(quantised, config), tokens)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)
    original = forward(config, params, tokens)
    assert np.abs(found - original).max() > 1e-4  # something was rounded


@settings(max_examples=10)
@given(
    st.lists(st.integers(1, 5), max_size=2),
    st.lists(st.integers(1, 9), min_size=1, max_size=2),
    st.lists(st.integers(1, 9), min_size=1, max_size=2),
    st.sampled_from(SCHEMES),
)
def test_fold_and_unfold(stack, rows, cols, scheme):
    shape = (*stack, *rows, *cols)
    fold = Fold(len(stack), len(rows))
    assert fold.shape(shape) == (*stack, np.prod(rows), np.prod(cols))
    names = "abcdef"[: len(shape)]
    assert fold.axes(tuple(names)) == (*names[: len(stack)], names[len(stack)], names[-len(cols)])
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.normal(size=(*rows, *cols)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(3, 2, *rows)), jnp.float32)
    matrix = quantize(weight.reshape(Fold(0, len(rows)).shape(weight.shape)), scheme)
    inner, outer = "ij"[: len(rows)], "kl"[: len(cols)]
    subscripts = f"...{inner},{inner}{outer}->...{outer}"
    found = contract(subscripts, x, matrix, l=cols[-1])
    expected = jnp.einsum(
        subscripts, x, dequantize(matrix).reshape(weight.shape), precision="highest"
    )
    assert found.shape == (3, 2, *cols)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_contract_takes_products_with_matrices_only():
    with pytest.raises(ValueError, match="no product with a matrix"):
        contract("df,...d->...f", jnp.ones((2, 2)), quantize(jnp.ones((2, 2)), "int8"))


def test_originals_are_freed():
    config = CONFIGS["plain"]
    original = make_params(config)
    expected = quantize_params(original, config, "int8")
    found = quantize_params(original, config, "int8", free=True)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    for path, weight in flat(original).items():
        assert weight.is_deleted() == isinstance(flat(found)[path], QuantizedMatrix), path


@pytest.mark.parametrize("scheme", SCHEMES)
def test_on_a_mesh(scheme):
    config = make_config(
        hidden_size=256, moe_intermediate_size=256, num_hidden_layers=2, first_k_dense_replace=0
    )
    whole = make_params(config)
    mesh = make_mesh(fsdp=2, expert=2, tensor=2)
    specs = flatten_specs(weight_specs(config))
    spread = {
        path: jax.device_put(weight, named_sharding(specs[path].axes, specs[path].shape, mesh))
        for path, weight in flat(whole).items()
    }
    quantised = quantize_params(traverse_util.unflatten_dict(spread, sep="/"), config, scheme)
    expected = flat(quantize_params(whole, config, scheme))
    for path, weight in flat(quantised).items():
        if isinstance(weight, QuantizedMatrix):
            for name in ("values", "scales"):
                found = getattr(weight, name)
                np.testing.assert_array_equal(bits(found), bits(getattr(expected[path], name)))
                assert found.sharding.mesh == mesh
    gate = quantised["moe_layers"]["moe"]["experts"]["gate"]
    full, part = gate.values.shape, gate.values.addressable_shards[0].data.shape
    assert [a // b for a, b in zip(full, part, strict=True)] == [1, 2, 2, 2]
    one_row = scheme == "int8"
    full, part = gate.scales.shape, gate.scales.addressable_shards[0].data.shape
    assert [a // b for a, b in zip(full, part, strict=True)] == [1, 2, 1 if one_row else 2, 2]
    if scheme != "int8":
        return
    tokens = jnp.zeros((1, 8), jnp.int32)
    np.testing.assert_allclose(
        forward(config, quantised, tokens),
        forward(config, quantize_params(whole, config, scheme), tokens),
        rtol=1e-5,
        atol=1e-5,
    )


def test_mini_fits_16_gb_in_int4_only():
    mini = ModelConfig.from_name("mini")
    sizes = {scheme: weight_bytes(mini, scheme, jnp.bfloat16) for scheme in (None, *SCHEMES)}
    assert [scheme for scheme, size in sizes.items() if size < 16e9] == ["int4"]


def test_errors():
    config = CONFIGS["plain"]
    params = make_params(config)
    with pytest.raises(ValueError, match="'int3' is none of int8, fp8, int4"):
        quantize_params(params, config, "int3")
    quantised = quantize_params(params, config, "int8")
    with pytest.raises(ValueError, match=r"quantised already \(int8\)"):
        quantize_params(quantised, config, "fp8")
    other = dataclasses.replace(config, num_attention_heads=8)
    with pytest.raises(ValueError, match="dense_layers/attention/query/kernel is quantised as"):
        forward(other, quantised, jnp.zeros((1, 4), jnp.int32))
    mixed = quantised | {"moe_layers": quantize_params(params, config, "fp8")["moe_layers"]}
    with pytest.raises(ValueError, match="several ways"):
        quantization_of(mixed)
