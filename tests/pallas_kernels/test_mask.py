"""The mask predicates against their definitions, pair by pair."""

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings

from pallas_kernels import block_causal, block_diffusion


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
