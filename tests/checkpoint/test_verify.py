"""Agreement of two models, against definitions written out."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_jax.checkpoint import Agreement, compare, kl_divergence, layer_drift


def plain_kl(a, b):
    p = [math.exp(x) / sum(math.exp(y) for y in a) for x in a]
    q = [math.exp(x) / sum(math.exp(y) for y in b) for x in b]
    return sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 5), vocabulary=st.integers(2, 9))
def test_against_plain_python(seed, rows, vocabulary):
    rng = np.random.default_rng(seed)
    a = rng.normal(0, 3, (rows, vocabulary))
    b = a + rng.normal(0, 1, (rows, vocabulary))
    found = compare(a, b)
    kl = [plain_kl(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert found.positions == rows
    assert found.mean_kl == pytest.approx(sum(kl) / rows, abs=1e-12)
    assert found.max_kl == pytest.approx(max(kl), abs=1e-12)
    assert found.max_logit_difference == pytest.approx(np.abs(a - b).max())
    best = [int(np.argmax(y)) for y in b]
    assert found.top1 == np.mean([int(np.argmax(x)) == i for x, i in zip(a, best, strict=True)])
    top5 = [i in np.argsort(-x)[:5] for x, i in zip(a, best, strict=True)]
    assert found.top5 == pytest.approx(np.mean(top5))


def test_a_model_agrees_with_itself():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 50)), jnp.bfloat16)
    hidden = [logits, logits * 2]
    assert compare(logits, logits, hidden_a=hidden, hidden_b=hidden) == Agreement(
        positions=14,
        mean_kl=0.0,
        max_kl=0.0,
        max_logit_difference=0.0,
        top1=1.0,
        top5=1.0,
        layer_drift=(0.0, 0.0),
    )


def test_many_positions_are_compared_in_chunks():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 700, 11)).astype(np.float32)
    whole = compare(a, b)
    assert whole.positions == 700
    assert whole.mean_kl == pytest.approx(kl_divergence(a.astype(float), b.astype(float)).mean())


def test_shift_of_all_logits_is_no_divergence():
    a = np.random.default_rng(0).normal(size=(4, 9))
    np.testing.assert_allclose(kl_divergence(a, a + 1000.0), 0, atol=1e-9)


def test_banned_tokens():
    a = np.array([[1.0, 2.0, -np.inf]])
    b = np.array([[1.0, 2.0, 3.0]])
    assert compare(a, a).mean_kl == 0
    assert compare(a, a).max_logit_difference == 0
    assert compare(a, b).mean_kl == pytest.approx(
        math.log(math.e + math.e**2 + math.e**3) - math.log(math.e + math.e**2)
    )
    assert compare(b, a).mean_kl == math.inf


def test_top5_is_wider_than_top1():
    a = np.arange(10.0)[None]
    for rank, inside in [(0, 1.0), (4, 1.0), (5, 0.0)]:
        b = np.zeros((1, 10))
        b[0, 9 - rank] = 1
        found = compare(a, b)
        assert (found.top1, found.top5) == (float(rank == 0), inside)


def test_layer_drift():
    x = np.ones((2, 3, 4))
    assert layer_drift([x, 2 * x], [x, 2.2 * x]) == pytest.approx((0, 0.1))
    assert layer_drift([0 * x], [0 * x]) == (0.0,)
    assert layer_drift([0 * x], [x]) == (1.0,)
    with pytest.raises(ValueError, match="1 and 2 layers"):
        layer_drift([x], [x, x])
    with pytest.raises(ValueError, match="do not match in shape"):
        layer_drift([x], [x[:1]])


def test_nothing_to_compare():
    with pytest.raises(ValueError, match="no positions"):
        compare(np.zeros((0, 5)), np.zeros((0, 5)))
    bad = np.full((1, 5), np.nan)
    with pytest.raises(ValueError, match="of model b hold NaN"):
        compare(np.zeros((1, 5)), bad)
