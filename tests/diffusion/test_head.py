"""The chunked head against the whole ``[B, L, V]`` table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.diffusion import head_stats

B, L, D, V, BANNED, TEMPERATURE = 3, 11, 5, 13, 4, 0.7


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    needed = rng.random((B, L)) < 0.6
    needed[2] = False
    return {
        "hidden": jnp.asarray(rng.normal(size=(B, L, D)), jnp.float32),
        "kernel": jnp.asarray(rng.normal(size=(D, V)), jnp.float32),
        "labels": jnp.asarray(rng.integers(0, V, (B, L))),
        "needed": jnp.asarray(needed),
        "cotangents": jnp.asarray(rng.normal(size=(2, B, L)), jnp.float32),
    }


def naive(hidden, kernel, labels, needed):
    scores = jnp.matmul(hidden, kernel.astype(hidden.dtype), precision="highest")
    scores = scores.astype(jnp.float32)
    log_prob = jnp.take_along_axis(jax.nn.log_softmax(scores), labels[..., None], -1)[..., 0]
    p = jax.nn.softmax(scores / TEMPERATURE)
    entropy = -(p * jnp.log(p)).sum(-1)
    allowed = scores.at[..., BANNED].set(-jnp.inf)
    stats = (
        log_prob,
        entropy,
        scores.argmax(-1),
        allowed.argmax(-1),
        jax.nn.softmax(allowed).max(-1),
    )
    return tuple(jnp.where(needed, s, 0) for s in stats)


def weighed(stats_of):
    """Loss with both differentiable outputs, and with the others as traps."""

    def loss(hidden, kernel, labels, needed, cotangents):
        stats = stats_of(hidden, kernel, labels, needed)
        value = (cotangents[0] * stats[0] + cotangents[1] * stats[1]).sum()
        return value, tuple(stats)

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


@functools.cache
def chunked(chunk, entropy_gradient=True):
    def stats_of(*args):
        return head_stats(*args, BANNED, TEMPERATURE, chunk, entropy_gradient)

    return weighed(stats_of)


reference = weighed(naive)


@pytest.mark.parametrize("chunk", [1, 3, 7, L, 50])
def test_values_and_gradients(data, chunk):
    (value, stats), gradients = chunked(chunk)(*data.values())
    (expected_value, expected), expected_gradients = reference(*data.values())
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    for got, wanted in zip(stats, expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)
    assert (np.asarray(stats[2]) == BANNED).any()  # or nothing was banned
    assert not (np.asarray(stats[3])[data["needed"]] == BANNED).any()
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("which", [0, 1], ids=["log_prob", "entropy"])
def test_each_cotangent_alone(data, which):
    one = data | {"cotangents": data["cotangents"].at[1 - which].set(0)}
    _, got = chunked(3)(*one.values())
    _, wanted = reference(*one.values())
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_without_the_gradient_of_the_entropy(data):
    (_, stats), got = chunked(3, False)(*data.values())
    (_, expected), _ = reference(*data.values())
    _, wanted = reference(*(data | {"cotangents": data["cotangents"].at[1].set(0)}).values())
    for a, b in zip((*stats, *got), (*expected, *wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("chunk", [3, 50])
def test_everything_needed_and_nothing(data, chunk):
    everything = data | {"needed": jnp.ones((B, L), bool)}
    (_, stats), gradients = chunked(chunk)(*everything.values())
    (_, expected), expected_gradients = reference(*everything.values())
    for got, wanted in zip((*stats, *gradients), (*expected, *expected_gradients), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)
    nothing = data | {"needed": jnp.zeros((B, L), bool)}
    (value, stats), gradients = chunked(chunk)(*nothing.values())
    assert value == 0
    for array in (*stats, *gradients):
        assert not np.asarray(array).any()


def test_positions_not_needed_do_not_matter(data):
    other = jnp.where(data["needed"][..., None], data["hidden"], 100.0)
    got = chunked(3)(*(data | {"hidden": other}).values())
    jax.tree.map(np.testing.assert_array_equal, got, chunked(3)(*data.values()))


def test_huge_scores_stay_finite(data):
    (value, stats), gradients = chunked(7)(*(data | {"kernel": 1e4 * data["kernel"]}).values())
    assert np.isfinite(value)
    for array in (*stats, *gradients):
        assert np.isfinite(array).all()


def test_bfloat16(data):
    half = data | {"hidden": data["hidden"].astype(jnp.bfloat16)}
    (value, stats), gradients = chunked(7)(*half.values())
    (expected_value, expected), expected_gradients = reference(*half.values())
    assert stats[0].dtype == jnp.float32
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32]
    np.testing.assert_allclose(value, expected_value, rtol=2e-2)
    for got, wanted in zip(stats, expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-2)
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        got, wanted = (np.asarray(a, np.float32) for a in (got, wanted))
        assert np.abs(got - wanted).max() < 2e-2 * np.abs(wanted).max()


def test_defaults(data):
    got = head_stats(*list(data.values())[:4], banned=BANNED)
    scores = jnp.matmul(data["hidden"], data["kernel"], precision="highest")
    log_p = jax.nn.log_softmax(scores)
    entropy = jnp.where(data["needed"], -(jnp.exp(log_p) * log_p).sum(-1), 0)
    np.testing.assert_allclose(got.entropy, entropy, atol=1e-5)


def largest_array(jaxpr):
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [v.aval.size for v in equation.outvars if hasattr(v.aval, "size")]
        for parameter in equation.params.values():
            for inner in parameter if isinstance(parameter, (tuple, list)) else [parameter]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    sizes.append(largest_array(inner))
    return max(sizes)


def test_the_whole_table_never_exists():
    hidden, kernel = jnp.zeros((2, 64, 4)), jnp.zeros((4, 1000))
    labels, needed = jnp.zeros((2, 64), int), jnp.ones((2, 64), bool)

    def trace(stats_of):
        gradient = jax.value_and_grad(lambda h, k: sum(s.sum() for s in stats_of(h, k)[:2]), (0, 1))
        return largest_array(jax.make_jaxpr(gradient)(hidden, kernel).jaxpr)

    whole = trace(lambda h, k: naive(h, k, labels, needed))
    assert whole >= 2 * 64 * 1000  # the walk does find such a table
    ours = trace(lambda h, k: head_stats(h, k, labels, needed, 0, 1.0, 8))
    assert ours == 2 * 8 * 1000
