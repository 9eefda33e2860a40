"""The rules of a step, property by property."""

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis.extra.numpy import arrays

from llada_jax.decoding.rules import mask_to_token, token_to_token, transfer_quota
from llada_jax.decoding.sampling import Adjustment, Proposal, filter_logits
from pallas_kernels.confidence_head import confidence_head

SIZE = 8
confidences = arrays(np.float32, (1, SIZE), elements=st.sampled_from([0.1, 0.5, 0.7, 0.9, 1.0]))
flags = arrays(bool, (1, SIZE))


def best_of(logits, adjustment=None):
    """What ``ModelDenoiser.propose`` does, with the identity for a head."""
    adjusted = {} if adjustment is None else adjustment._asdict()
    best = confidence_head(logits, jnp.eye(logits.shape[-1]), **adjusted)
    return Proposal(best.token, best.probability, best.entropy)


@given(flags, confidences, st.sampled_from([0.0, 0.5, 0.7, 1.0]), st.integers(1, 10))
def test_mask_to_token(masked, confidence, threshold, minimum):
    chosen = np.asarray(
        mask_to_token(
            jnp.asarray(masked),
            jnp.asarray(confidence),
            jnp.full(1, threshold),
            jnp.full(1, minimum),
        )
    )[0]
    masked, confidence = masked[0], confidence[0]
    assert not (chosen & ~masked).any()
    above = masked & (confidence > np.float32(threshold))
    if above.sum() >= minimum:
        assert (chosen == above).all()
    else:
        best = sorted(np.flatnonzero(masked), key=lambda i: (-confidence[i], i))[:minimum]
        assert sorted(best) == np.flatnonzero(chosen).tolist()


@given(flags, arrays(np.int32, (2, SIZE), elements=st.integers(0, 2)), confidences)
def test_token_to_token(editable, tokens, confidence):
    edit = token_to_token(
        jnp.asarray(editable),
        jnp.asarray(tokens[:1]),
        jnp.asarray(tokens[1:]),
        jnp.asarray(confidence),
        jnp.full(1, 0.5),
    )
    expected = editable & (tokens[:1] != tokens[1:]) & (confidence > 0.5)
    np.testing.assert_array_equal(edit, expected)
    off = token_to_token(
        jnp.asarray(editable), jnp.asarray(tokens[:1]), jnp.asarray(tokens[1:]),
        jnp.asarray(confidence), jnp.full(1, jnp.inf),
    )  # fmt: skip
    assert not off.any()


@given(st.integers(1, 80), st.sampled_from([1, 8, 32]))
def test_quota_adds_up_to_the_block(steps, block):
    quotas = [
        int(transfer_quota(jnp.array([s]), jnp.array([steps]), block)[0]) for s in range(steps)
    ]
    assert sum(quotas) == block
    assert quotas == sorted(quotas, reverse=True)


def test_greedy_ties_go_to_the_lowest_id():
    proposal = best_of(jnp.array([[[1.0, 3.0, 3.0, 0.0]]]))
    assert int(proposal.tokens[0, 0]) == 1
    p = np.exp([1, 3, 3, 0]) / np.exp([1, 3, 3, 0]).sum()
    np.testing.assert_allclose(proposal.confidence[0, 0], p[1], rtol=1e-6)
    np.testing.assert_allclose(proposal.entropy[0, 0], -(p * np.log(p)).sum(), rtol=1e-6)


def test_banned_mask_leaves_probabilities_of_the_others():
    logits = jnp.array([[[1.0, 2.0, 9.0], [0.0, 0.0, 5.0]]])
    tokens = jnp.array([[2, 0]])
    proposal = best_of(logits, Adjustment.of(tokens, 2, jnp.array([True]), jnp.zeros(1)))
    np.testing.assert_array_equal(proposal.tokens, [[1, 0]])
    np.testing.assert_allclose(proposal.confidence[0, 1], 0.5)
    assert np.isfinite(proposal.entropy).all()
    kept = best_of(logits, Adjustment.of(tokens, 2, jnp.array([False]), jnp.zeros(1)))
    np.testing.assert_array_equal(kept.tokens, [[2, 2]])


def test_penalty_lowers_the_left_neighbours_token():
    logits = jnp.zeros((1, 3, 4))
    tokens = jnp.array([[1, 3, 0]])
    got = Adjustment.of(tokens, 2, jnp.array([False]), jnp.array([1.5])).apply(logits)
    expected = np.zeros((1, 3, 4))
    expected[0, 1, 1] = expected[0, 2, 3] = -1.5
    np.testing.assert_array_equal(got, expected)


@given(
    arrays(np.float32, (1, 1, 12), elements=st.floats(-4, 4, width=16)),
    st.sampled_from([0, 1, 3, 12, 50]),
    st.sampled_from([1.0, 0.9, 0.4, 0.0]),
    st.sampled_from([0.0, 0.1, 1.0]),
)
def test_filters(logits, top_k, top_p, min_p):
    kept = np.isfinite(
        filter_logits(
            jnp.asarray(logits), jnp.array([top_k]), jnp.array([top_p]), jnp.array([min_p])
        )
    )[0, 0]
    logits = logits[0, 0]
    assert kept[logits.argmax()]
    if top_k:  # ties with the k-th stay
        kth = np.sort(logits)[::-1][min(top_k, 12) - 1]
        assert not kept[logits < kth].any()
    if min_p == 1.0:
        assert (logits[kept] == logits.max()).all()
    smallest = logits[kept].min()
    assert kept[logits >= smallest].all()  # only the least likely are dropped
    if top_k == 0 and min_p == 0:
        p = np.exp(logits - logits.max())
        p /= p.sum()
        above = p[logits > smallest].sum()
        assert above <= top_p + 1e-5
