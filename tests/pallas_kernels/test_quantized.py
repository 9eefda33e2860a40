import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import quantized
from pallas_kernels.quantized import dequantize, matmul, quantize, unpack_int4


def weight(shape, seed=0, scale=0.02):
    return scale * jax.random.normal(jax.random.key(seed), shape)


@hypothesis.settings(max_examples=12)
@hypothesis.given(
    st.sampled_from(quantized.SCHEMES),
    st.integers(1, 300),
    st.integers(1, 140),
    st.sampled_from([(), (2,), (2, 1)]),
)
def test_error_is_within_half_a_step(scheme, rows, cols, stack):
    w = weight((*stack, rows, cols))
    matrix = quantize(w, scheme)
    assert matrix.shape == w.shape
    error = np.abs(dequantize(matrix) - w)
    if scheme == "int8":
        limit = np.abs(w).max(-2, keepdims=True) / 127 / 2
    elif scheme == "int4":
        limit = np.abs(w).max(-2, keepdims=True) / 7 / 2
    else:  # three mantissa bits; below the smallest normal the step is that of 2**-9
        limit = np.maximum(np.abs(w) / 16, np.abs(w).max((-2, -1), keepdims=True) / 448 * 2**-10)
    assert (error <= limit * 1.001).all()


@pytest.mark.parametrize("scheme", quantized.SCHEMES)
def test_the_extremes_and_zero_are_exact(scheme):
    w = jnp.zeros((256, 256)).at[3, 5].set(0.7).at[200, 7].set(-1.4)
    back = dequantize(quantize(w, scheme))
    np.testing.assert_allclose(back, w, rtol=1e-6)
    assert (np.asarray(back)[np.asarray(w) == 0] == 0).all()


@pytest.mark.parametrize("scheme", quantized.SCHEMES)
def test_quantising_twice_changes_nothing(scheme):
    once = quantize(weight((300, 130)), scheme)
    twice = quantize(dequantize(once), scheme)
    np.testing.assert_array_equal(
        np.asarray(once.values, np.float32), np.asarray(twice.values, np.float32)
    )


def test_unpack_is_the_inverse_of_packing():
    rows = np.random.default_rng(0).integers(-7, 8, (256, 5)).astype(np.int8)
    rows[0] = rows[128] = 7  # every group reaches 7: its scale is 1
    matrix = quantize(jnp.asarray(rows, jnp.float32), "int4")
    np.testing.assert_array_equal(unpack_int4(matrix.values), rows)


@pytest.mark.parametrize("scheme", quantized.SCHEMES)
@pytest.mark.parametrize("shape", [(64, 48), (300, 130)])
def test_matmul(scheme, shape):
    matrix = quantize(weight(shape), scheme)
    x = jax.random.normal(jax.random.key(1), (2, 3, shape[0]))
    expected = np.asarray(x, np.float64) @ np.asarray(dequantize(matrix), np.float64)
    np.testing.assert_allclose(jax.jit(matmul)(x, matrix), expected, atol=1e-5)


def test_sizes():
    w = weight((256, 512))
    share = {s: quantize(w, s).nbytes / (2 * w.size) for s in quantized.SCHEMES}
    assert share == pytest.approx({"int8": 0.5, "fp8": 0.5, "int4": 0.25}, rel=0.07)


def test_unknown_scheme():
    with pytest.raises(ValueError, match="int8, fp8, int4"):
        quantize(weight((2, 2)), "int3")
