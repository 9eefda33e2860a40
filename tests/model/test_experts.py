"""Grouped products, routing and the mixture, against dense evaluation."""

import dataclasses

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from llada_jax.config import ModelConfig
from llada_jax.model import LLaDA2
from llada_jax.model.experts import mixture_of_experts
from llada_jax.model.layers import gated_mlp
from llada_jax.model.router import route
from pallas_kernels.expert_mlp.grouped_matmul import _ragged_dot, grouped_matmul


def dense(rows, matrices, sizes):
    """Each row times the matrix of its group, one after the other."""
    out = np.zeros((len(rows), matrices.shape[2]), np.float32)
    start = 0
    for group, size in enumerate(np.asarray(sizes)):
        out[start : start + size] = rows[start : start + size] @ matrices[group]
        start += size
    return out


@st.composite
def groups(draw):
    """Few (rows, groups) pairs, so that few programs compile; sizes vary freely in them."""
    rows, count = draw(st.sampled_from([(1, 1), (7, 3), (64, 4), (200, 16)]))
    cuts = sorted(draw(st.lists(st.integers(0, rows), min_size=count, max_size=count)))
    return rows, np.diff([0, *cuts]).astype(np.int32)


def loss_of(product):
    return lambda rows, matrices, sizes, weight: (product(rows, matrices, sizes) * weight).sum()


product = jax.jit(grouped_matmul)
gradients = jax.jit(jax.grad(loss_of(grouped_matmul), (0, 1)))
reference_gradients = jax.jit(jax.grad(loss_of(_ragged_dot), (0, 1)))


@given(groups(), st.integers(0, 2**16))
@settings(max_examples=60)
def test_grouped_matmul_and_its_gradients(sizes_of, seed):
    count, sizes = sizes_of
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(count, 12)).astype(np.float32)
    matrices = rng.normal(size=(len(sizes), 12, 5)).astype(np.float32)
    weight = rng.normal(size=(count, 5)).astype(np.float32)
    expected = dense(rows, matrices, sizes)
    rows, matrices, sizes, weight = map(jnp.asarray, (rows, matrices, sizes, weight))
    np.testing.assert_allclose(product(rows, matrices, sizes), expected, atol=1e-5)
    stacked = jnp.stack([jnp.zeros_like(matrices), matrices])
    indexed = product(rows, stacked, sizes, jnp.int32(1))
    np.testing.assert_allclose(indexed, expected, atol=1e-5)
    ours = gradients(rows, matrices, sizes, weight)
    theirs = reference_gradients(rows, matrices, sizes, weight)
    for mine, reference in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, reference, atol=1e-4)


def test_bfloat16_gradients_add_up_in_float32():
    """Many tiles of one group: as close to the float32 gradient as ``ragged_dot``'s."""
    rng = np.random.default_rng(0)
    rows, matrices, weight = (
        rng.normal(size=shape).astype(np.float32) for shape in ((900, 8), (2, 8, 4), (900, 4))
    )
    sizes = jnp.array([800, 100])
    exact = gradients(jnp.asarray(rows), jnp.asarray(matrices), sizes, jnp.asarray(weight))[1]
    half = [jnp.asarray(a, jnp.bfloat16) for a in (rows, matrices, weight)]
    rough = gradients(half[0], half[1], sizes, half[2])[1]
    error = np.abs(np.asarray(rough, np.float32) - exact).max() / np.abs(exact).max()
    assert error < 1e-2


def make_config(**changes) -> ModelConfig:
    base = ModelConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, rotary_dim=4,
        num_experts=8, num_experts_per_tok=3, num_shared_experts=1, moe_intermediate_size=12,
        n_group=4, topk_group=2, first_k_dense_replace=1, routed_scaling_factor=2.5,
        mask_token_id=39, eos_token_ids=(38,), pad_token_id=38, max_position_embeddings=256,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def route_by_hand(x, kernel, bias, c):
    """The specification's router, one token at a time."""
    ids, gates = [], []
    for token in x:
        scores = 1 / (1 + np.exp(-(token.astype(np.float64) @ kernel)))
        biased = scores + bias
        per_group = biased.reshape(c.n_group, -1)
        group_scores = np.sort(per_group, axis=1)[:, -2:].sum(1)
        keep = np.argsort(-group_scores, kind="stable")[: c.topk_group]
        if c.n_group > 1:
            allowed = np.isin(np.arange(c.n_group), keep).repeat(per_group.shape[1])
            biased = np.where(allowed, biased, -np.inf)
        chosen = np.argsort(-biased, kind="stable")[: c.num_experts_per_tok]
        weights = scores[chosen] / (scores[chosen].sum() + 1e-20) * c.routed_scaling_factor
        ids.append(chosen)
        gates.append(weights)
    return np.array(ids), np.array(gates)


@pytest.mark.parametrize("changes", [{}, {"n_group": 1, "topk_group": 1}, {"topk_group": 4}])
@pytest.mark.parametrize("seed", range(3))
def test_router(changes, seed):
    config = make_config(**changes)
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(50, 16)).astype(np.float32)
    kernel = rng.normal(size=(16, 8)).astype(np.float32)
    bias = rng.normal(size=8).astype(np.float32)
    ids, gates = route(*map(jnp.asarray, (x, kernel, bias)), config)
    expected_ids, expected_gates = route_by_hand(x, kernel, bias, config)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(gates, expected_gates, rtol=1e-5)


def test_router_ties_go_to_the_lower_expert():
    config = make_config(n_group=1, topk_group=1)
    ids, gates = route(jnp.zeros((1, 16)), jnp.ones((16, 8)), jnp.zeros(8), config)
    np.testing.assert_array_equal(ids, [[0, 1, 2]])
    np.testing.assert_allclose(gates, np.full((1, 3), 2.5 / 3), rtol=1e-6)


@pytest.mark.parametrize("shared", [0, 1, 3])
def test_mixture_equals_dense_evaluation(shared):
    config = make_config(num_shared_experts=shared)
    params = LLaDA2(config).init_params(jax.random.key(shared))
    weights = jax.tree.map(lambda w: 10 * w[0], params["moe_layers"]["moe"])
    assert ("shared" in weights) == bool(shared)
    x = jax.random.normal(jax.random.key(1), (2, 9, 16))
    flat = np.asarray(x).reshape(-1, 16)
    router = weights["router"]
    ids, gates = route(jnp.asarray(flat), router["kernel"], router["expert_bias"], config)
    expected = np.zeros_like(flat)
    for token in range(len(flat)):
        for expert, gate in zip(ids[token], gates[token], strict=True):
            one = {k: {"kernel": v[expert]} for k, v in weights["experts"].items()}
            expected[token] += np.asarray(gate * gated_mlp(jnp.asarray(flat[token]), one))
        if shared:
            expected[token] += np.asarray(gated_mlp(jnp.asarray(flat[token]), weights["shared"]))
    mixture = jax.jit(lambda x, weights, live: mixture_of_experts(x, weights, config, live)[0])
    got = mixture(x, weights, None)
    np.testing.assert_allclose(got.reshape(-1, 16), expected, atol=1e-4)
    live = jax.random.bernoulli(jax.random.key(2), 0.5, (2, 9))
    masked = mixture(x, weights, live)
    np.testing.assert_allclose(masked[live], got[live], atol=1e-5)
    assert np.isfinite(masked).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"first_k_dense_replace": 0, "tie_word_embeddings": True},
        {"num_experts": 0, "use_bias": True, "use_qkv_bias": True, "num_key_value_heads": 4},
        {"num_hidden_layers": 3, "first_k_dense_replace": 2, "num_shared_experts": 0},
        {"rotary_dim": 0},
    ],
)
def test_variants_run_and_learn(changes):
    """Every variant that a config.json can say has finite outputs, and gradients everywhere."""
    config = make_config(**changes)
    model = LLaDA2(config)
    params = model.init_params(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, 40)

    @jax.jit
    @jax.grad
    def gradient(params):
        out = model.apply({"params": params}, tokens)
        return jnp.square(model.apply({"params": params}, out.hidden, method="logits")).sum()

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(params)):
        assert jnp.isfinite(leaf).all()
        if "expert_bias" not in jax.tree_util.keystr(path):
            assert jnp.abs(leaf).max() > 0, path
