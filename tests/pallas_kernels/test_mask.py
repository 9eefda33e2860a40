"""The mask predicates against their definitions, pair by pair."""

import re

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings

from pallas_kernels import block_causal, block_diffusion, block_diffusion_packed


@given(st.integers(1, 7), st.sampled_from([1, 9, 32]))
@settings(max_examples=21)
def test_block_causal(block, length):
    place = jnp.arange(length)
    got = np.asarray(block_causal(place[:, None], place[None, :], block))
    for q in range(length):
        for k in range(length):
            assert bool(got[q, k]) == (k // block <= q // block)


@given(st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=16)
def test_block_diffusion(block, blocks):
    length = block * blocks
    place = jnp.arange(2 * length)
    got = np.asarray(block_diffusion(place[:, None], place[None, :], length, block))
    for q in range(2 * length):
        for k in range(2 * length):
            q_noisy, k_noisy = q < length, k < length
            q_block, k_block = q % length // block, k % length // block
            if q_noisy and k_noisy:
                expected = q_block == k_block
            elif q_noisy:
                expected = q_block > k_block
            elif k_noisy:
                expected = False
            else:
                expected = q_block >= k_block
            assert bool(got[q, k]) == expected


def packed(copies, blocks, documents):
    """The mask of tokens with these coordinates among themselves."""
    coordinates = [jnp.asarray(c) for c in (copies, blocks, documents)]
    query, key = (tuple(c[:, None] for c in coordinates), tuple(c[None] for c in coordinates))
    return np.asarray(block_diffusion_packed(query, key))


token = st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 2))


@given(st.lists(token, min_size=12, max_size=12))
@settings(max_examples=30)
def test_block_diffusion_packed(tokens):
    got = packed(*np.array(tokens).T)
    for q, (q_copy, q_block, q_document) in enumerate(tokens):
        for k, (k_copy, k_block, k_document) in enumerate(tokens):
            if q_document != k_document:
                expected = False
            elif q_copy == k_copy == 0:
                expected = q_block >= k_block
            elif q_copy == k_copy:
                expected = q_block == k_block
            else:
                expected = k_copy == 0 and q_block > k_block
            assert bool(got[q, k]) == expected


def test_block_diffusion_packed_of_one_copy_and_document():
    length, block = 12, 3
    place = np.arange(2 * length)
    got = packed(1 - place // length, place % length // block, np.ones_like(place))
    expected = block_diffusion(jnp.asarray(place)[:, None], jnp.asarray(place)[None], length, block)
    np.testing.assert_array_equal(got, expected)


def test_block_diffusion_packed_as_it_is_drawn():
    """The picture in the documentation."""
    lines = (block_diffusion_packed.__doc__ or "").splitlines()
    lines = [re.sub(r"x_(t'|t|0)", "", line) for line in lines if line.count("|") == 2]
    picture = np.array([[c == "1" for c in line if c in "1."] for line in lines])
    assert picture.shape == (12, 12)
    place = np.arange(12)
    copies = np.array([1, 2, 0])[place // 4]
    np.testing.assert_array_equal(packed(copies, place % 4 // 2, np.ones_like(place)), picture)
