"""Copies, casts and the search for NaN and infinity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_jax.checkpoint.matrices import aligned_empty, all_finite, cast, copy_matrix, scratch

from .synthetic import BF16, F16, F32


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 40),
    cols=st.integers(1, 40),
    dtype=st.sampled_from([BF16, F16, F32]),
    flip_out=st.booleans(),
    flip_source=st.booleans(),
    part=st.booleans(),
)
def test_copy_is_an_assignment_whatever_the_orientation(
    rows, cols, dtype, flip_out, flip_source, part
):
    source = np.random.default_rng(0).normal(size=(rows, cols)).astype(dtype)
    source = np.asfortranarray(source) if flip_source else source
    out = np.zeros((rows, cols), dtype, order="F" if flip_out else "C")
    expected = out.copy()
    half = slice(rows // 2, rows) if part else slice(None)
    copy_matrix(out[half], source[half])
    expected[half] = source[half]
    assert out.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_every_16_bit_pattern_is_classified(dtype):
    patterns = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    found = np.array([all_finite(patterns[i : i + 1]) for i in range(1 << 16)])
    np.testing.assert_array_equal(found, np.isfinite(patterns.astype(np.float32)))


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_one_bad_value_is_found(dtype, value):
    block = np.linspace(-60_000, 60_000, 77).astype(dtype).reshape(7, 11)
    assert all_finite(block)
    block[3, 4] = value
    assert not all_finite(block)


def test_extremes_are_finite():
    limits = np.finfo(np.float32)
    assert all_finite(np.array([limits.max, limits.min, limits.tiny, -0.0], np.float32))
    assert all_finite(np.empty(0, np.float32))


@pytest.mark.parametrize("source", [BF16, F16, F32])
@pytest.mark.parametrize("target", [BF16, F16, F32])
def test_cast_rounds_as_jax_does(source, target):
    values = np.random.default_rng(0).normal(0, 300, 5000).astype(source)
    expected = np.asarray(jnp.asarray(values).astype(target))
    assert cast(values, target).tobytes() == expected.tobytes()


def test_cast_overflow_does_not_warn():
    assert np.isinf(cast(np.array([1e30], np.float32), F16)).all()


@pytest.mark.parametrize("shape", [(1,), (3, 5), (64, 64), (1000, 33)])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_aligned_buffers_are_adopted_without_a_copy(shape, dtype):
    buffer = aligned_empty(shape, dtype)
    assert buffer.ctypes.data % 64 == 0
    buffer[...] = 1
    array = jax.device_put(buffer, jax.devices()[0])
    assert array.unsafe_buffer_pointer() == buffer.ctypes.data


def test_donating_an_adopted_buffer_leaves_it_alone():
    buffer = aligned_empty((64, 64), F32)
    buffer[...] = 3
    array = jax.device_put(buffer, jax.devices()[0])
    doubled = jax.jit(lambda x: x * 2 + 1, donate_argnums=0)(array)
    assert array.is_deleted()
    assert (buffer == 3).all()
    assert float(doubled.min()) == float(doubled.max()) == 7


def test_scratch_memory_is_reused():
    first = scratch(4, 8, F32)
    assert scratch(2, 3, BF16).shape == (2, 3)
    assert np.shares_memory(first, scratch(4, 8, F32))
