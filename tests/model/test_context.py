"""What training asks of the model: a context with gradients, remat, routing statistics."""

import dataclasses

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from llada_jax.model import LLaDA2
from llada_jax.model.experts import mixture_of_experts
from llada_jax.model.router import router_logits
from pallas_kernels.expert_mlp.xla import permute
from tests.model.test_experts import make_config, route_by_hand

LENGTH = 8
BOTH = LLaDA2(make_config(num_hidden_layers=3, initializer_range=0.3))  # 1 dense, 2 with experts
EXPERTS = LLaDA2(make_config(first_k_dense_replace=0, initializer_range=0.3))


@pytest.fixture(scope="module")
def params():
    return BOTH.init_params(jax.random.key(0))


@pytest.fixture(scope="module")
def inputs():
    """Tokens, positions and mask of two spans, of which the first does not see the second."""
    tokens = jax.random.randint(jax.random.key(1), (2, 2 * LENGTH), 0, 38)
    positions = jnp.concatenate([jnp.arange(LENGTH), jnp.arange(3, LENGTH + 3)])
    mask = jax.random.bernoulli(jax.random.key(2), 0.5, (2, 2 * LENGTH, 2 * LENGTH))
    mask = (mask | jnp.eye(2 * LENGTH, dtype=bool)).at[:, :LENGTH, LENGTH:].set(False)
    weight = jax.random.normal(jax.random.key(3), (2, 2 * LENGTH, 16))
    return tokens, jnp.broadcast_to(positions, tokens.shape), mask, weight


def test_context_equals_one_joint_forward(params, inputs):
    """Its gradient too: ``tests/diffusion`` has the released code's, through a context."""

    def run(params, tokens, positions, mask, context=None):
        out = BOTH.apply({"params": params}, tokens, positions, mask=mask, context=context)
        return out.hidden, out.fresh, out.router

    run = jax.jit(run)
    tokens, positions, mask, _ = inputs
    first, second = slice(0, LENGTH), slice(LENGTH, None)
    before = run(params, tokens[:, first], positions[:, first], mask[:, first, first])
    after = run(params, tokens[:, second], positions[:, second], mask[:, second], before[1])
    hidden = jnp.concatenate([before[0], after[0]], axis=1)
    fresh = jax.tree.map(lambda *x: jnp.concatenate(x, axis=3), before[1], after[1])
    router = jax.tree.map(jnp.add, before[2], after[2])
    expected = run(params, tokens, positions, mask)
    for got, wanted in zip(
        jax.tree.leaves((hidden, fresh, router)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_remat_changes_no_gradient(inputs):
    params = EXPERTS.init_params(jax.random.key(4))
    tokens, positions, mask, weight = inputs

    def gradient(remat):
        model = dataclasses.replace(EXPERTS, remat=remat)

        def loss(params):
            out = model.apply({"params": params}, tokens, positions, mask=mask)
            return (weight * out.hidden).sum() + 0.1 * out.router.z.sum()

        traced = jax.jit(jax.grad(loss)).trace(params)
        return traced.lower().compile()(params), str(traced.jaxpr).count("exp ")

    (expected, exponentials), dots, full = map(gradient, ("none", "dots", "full"))
    for got, recomputed in (dots, full):
        assert recomputed > exponentials
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, expected)
    with pytest.raises(ValueError, match="none, dots, full"):
        gradient("some")


def test_router_statistics(params):
    """Load and z-loss over live tokens, one layer at a time and stacked over layers."""
    config = BOTH.config
    weights = jax.tree.map(lambda w: w[0], params["moe_layers"]["moe"])
    bias = jnp.asarray(np.random.default_rng(0).normal(size=8), jnp.float32)
    weights["router"]["expert_bias"] = bias
    x = jax.random.normal(jax.random.key(5), (2, LENGTH, 16))
    live = jax.random.bernoulli(jax.random.key(6), 0.6, (2, LENGTH))
    statistics = jax.jit(lambda x, live: mixture_of_experts(x, weights, config, live)[1])
    for mask in (live, jnp.ones_like(live), jnp.zeros_like(live)):
        flat = np.asarray(x)[np.asarray(mask)]
        kernel = np.asarray(weights["router"]["kernel"])
        ids, _ = route_by_hand(flat, kernel, np.asarray(bias), config)
        got = statistics(x, mask)
        np.testing.assert_array_equal(got.load, np.bincount(ids.ravel().astype(int), minlength=8))
        scores = flat.astype(np.float64) @ kernel
        np.testing.assert_allclose(got.z, (np.log(np.exp(scores).sum(1)) ** 2).sum(), rtol=1e-5)
    tokens = jnp.zeros((2, LENGTH), int)
    out = jax.jit(lambda p: BOTH.apply({"params": p}, tokens, live=live))(params)
    np.testing.assert_array_equal(out.router.load.sum(-1), [3 * live.sum()] * 2)
    assert out.router.z.shape == (2,)


def test_z_loss_gradient():
    logits = lambda w: router_logits(jnp.ones((4, 16)), w)  # noqa: E731
    kernel = jax.random.normal(jax.random.key(7), (16, 8))
    scores, pull_back = jax.vjp(logits, kernel)
    assert scores.dtype == jnp.float32
    lse = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    (by_hand,) = pull_back(2 * lse * jax.nn.softmax(scores))
    got = jax.grad(lambda w: jnp.square(jax.nn.logsumexp(logits(w), axis=-1)).sum())(kernel)
    np.testing.assert_allclose(got, by_hand, rtol=1e-5)


def test_a_dense_model_has_no_router_statistics():
    model = LLaDA2(make_config(num_experts=0))
    params = model.init_params(jax.random.key(8))
    out = jax.eval_shape(lambda p: model.apply({"params": p}, jnp.zeros((1, 4), int)), params)
    assert out.router is None


@jax.jit
def permute_both_ways(x, order, weight):
    back = jnp.argsort(order)
    ours = jax.value_and_grad(lambda x: (weight * permute(x, order, back)).sum())(x)
    plain = jax.value_and_grad(lambda x: (weight * x[order]).sum())(x)
    return ours, plain


@given(st.permutations(range(12)), st.integers(0, 2**16))
@settings(max_examples=10)
def test_permute_and_its_gradient(order, seed):
    x, weight = np.random.default_rng(seed).normal(size=(2, 12, 3)).astype(np.float32)
    ours, plain = permute_both_ways(x, np.array(order), weight)
    np.testing.assert_allclose(ours[0], plain[0], rtol=1e-6)
    np.testing.assert_array_equal(ours[1], plain[1])
