"""Attention against a loop over heads, rotary scaling against its definitions."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.config import RopeScaling
from llada_jax.model import KVCache
from llada_jax.model.attention import attend, attend_cached
from llada_jax.model.rotary import apply_rotary, inverse_frequencies, rotary_tables
from pallas_kernels import WindowMask
from tests.model.test_experts import make_config


def attend_by_hand(query, key, value, visible):
    """``query [T, N, H]``, ``key, value [K, S, H]``, ``visible [T, S]``."""
    out = np.zeros_like(query)
    groups = query.shape[1] // key.shape[0]
    for head in range(query.shape[1]):
        scores = query[:, head] @ key[head // groups].T / math.sqrt(query.shape[2])
        scores = np.where(visible, scores, -np.inf)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        out[:, head] = weights @ value[head // groups]
    return out


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attend(heads, cached, masked):
    n, k = heads
    rng = np.random.default_rng(n * k + cached)
    batch, length, memory, dim = 3, 5, 12, 6  # pieces of gcd(12, 128) = 4 positions
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    query, key, value = draw(batch, length, n, dim), *draw(2, batch, k, length, dim)
    layers = draw(2, 2, batch, k, memory, dim)  # keys and values of two layers
    lengths = np.array([0, 3, 9])
    mask = np.tril(np.ones((batch, length, length), bool)) if masked else None
    fresh = map(jnp.asarray, (query, key, value))
    if cached:
        window = WindowMask(causal=jnp.ones(batch, bool), block_length=1) if masked else None
        memory_of_layers = KVCache(*map(jnp.asarray, layers))
        got = attend_cached(*fresh, memory_of_layers, jnp.asarray(lengths), 1, window)
    else:
        got = attend(*fresh, jnp.asarray(mask) if masked else None)
    cache = layers[:, 1]
    for row in range(batch):
        fresh = mask[row] if masked else np.ones((length, length), bool)
        keys, values, visible = key[row], value[row], fresh
        if cached:
            keys = np.concatenate([cache[0, row], keys], axis=1)
            values = np.concatenate([cache[1, row], values], axis=1)
            old = np.broadcast_to(np.arange(memory) < lengths[row], (length, memory))
            visible = np.concatenate([old, fresh], axis=1)
        expected = attend_by_hand(query[row], keys, values, visible)
        np.testing.assert_allclose(got[row], expected, atol=1e-5)


def test_rotary_turns_the_first_part_of_a_head_only():
    config = make_config(rotary_dim=4)
    positions = jnp.array([[0, 1, 7]])
    cos, sin = rotary_tables(positions, config, jnp.float32)
    x = np.random.default_rng(0).normal(size=(1, 3, 2, 8)).astype(np.float32)
    got = np.asarray(apply_rotary(jnp.asarray(x), cos, sin))
    np.testing.assert_array_equal(got[..., 4:], x[..., 4:])
    np.testing.assert_array_equal(got[:, 0], x[:, 0])
    for i in range(2):  # pairs (i, 2 + i) turn by position * theta^(-2i/4)
        angle = 7 * config.rope_theta ** (-2 * i / 4)
        z = (x[0, 2, :, i] + 1j * x[0, 2, :, i + 2]) * np.exp(1j * angle)
        np.testing.assert_allclose(got[0, 2, :, i], z.real, atol=1e-5)
        np.testing.assert_allclose(got[0, 2, :, i + 2], z.imag, atol=1e-5)


def scaled(**fields):
    config = make_config(rotary_dim=8, rope_theta=10_000.0)
    plain, _ = inverse_frequencies(config)
    frequencies, factor = inverse_frequencies(
        dataclasses.replace(config, rope_scaling=RopeScaling(**fields))
    )
    return plain, frequencies, factor


def test_linear_scaling_divides():
    plain, frequencies, factor = scaled(rope_type="linear", factor=4.0)
    np.testing.assert_allclose(frequencies, plain / 4)
    assert factor == 1


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones():
    plain, frequencies, _ = scaled(
        rope_type="llama3", factor=8.0, original_max_position_embeddings=512
    )
    waves = 2 * np.pi / plain
    assert (waves < 512 / 4).any()
    assert (waves > 512).any()
    np.testing.assert_allclose(frequencies[waves < 512 / 4], plain[waves < 512 / 4])
    np.testing.assert_allclose(frequencies[waves > 512], plain[waves > 512] / 8)


def test_yarn_scaling_blends_by_turns():
    plain, frequencies, factor = scaled(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=4096
    )
    np.testing.assert_allclose(frequencies[0], plain[0])
    np.testing.assert_allclose(frequencies[-1], plain[-1] / 4)
    assert factor == pytest.approx(0.1 * math.log(4) + 1)
