import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llada_jax.training.config import TrainSection
from llada_jax.training.optimizer import (
    balance_experts,
    decays,
    global_norm,
    learning_rate,
    make_optimizer,
    without_padding_gradient,
)


def section(**fields) -> TrainSection:
    given = {"lr": 1.0, "lr_min": 0.1, "lr_warmup_ratio": 0.1, "max_steps": 100}
    return TrainSection(output_dir="-", **(given | fields))


@pytest.mark.parametrize("style", ["cosine", "wsd", "constant"])
def test_warm_up_rises_from_zero_to_lr(style):
    rate = learning_rate(section(lr_decay_style=style), 100)
    np.testing.assert_allclose([rate(s) for s in (0, 5, 10)], [0, 0.5, 1.0], rtol=1e-6)
    unwarmed = learning_rate(section(lr_decay_style=style, lr_warmup_ratio=0.0), 100)
    assert unwarmed(0) == 1.0


def test_cosine():
    rate = learning_rate(section(lr_decay_style="cosine"), 100)
    middle = 0.1 + 0.9 * 0.5  # halfway between 10 and 100
    np.testing.assert_allclose([rate(s) for s in (55, 100, 200)], [middle, 0.1, 0.1], rtol=1e-6)
    quarter = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi / 3))
    np.testing.assert_allclose(rate(40), quarter, rtol=1e-6)


def test_wsd():
    rate = learning_rate(section(lr_decay_style="wsd", lr_decay_ratio=0.2), 100)
    expected = [1.0, 1.0, 0.55, 0.1, 0.1]
    np.testing.assert_allclose([rate(s) for s in (11, 80, 90, 100, 150)], expected, rtol=1e-6)
    all_decay = learning_rate(section(lr_decay_style="wsd", lr_decay_ratio=1.0), 100)
    np.testing.assert_allclose([all_decay(s) for s in (10, 55, 100)], [1, 0.55, 0.1], rtol=1e-6)


def test_constant():
    rate = learning_rate(section(lr_decay_style="constant"), 100)
    assert [float(rate(s)) for s in (10, 55, 100)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("style", ["cosine", "wsd", "constant"])
def test_one_step_runs(style):
    rate = learning_rate(section(lr_decay_style=style, max_steps=1), 1)
    assert np.isfinite(float(rate(0)))


def test_decay_is_for_matrices():
    from llada_jax.config import ModelConfig
    from llada_jax.model import LLaDA2
    from tests.training.tiny import MOE

    config = ModelConfig.from_hf(MOE | {"use_qkv_bias": True, "first_k_dense_replace": 1})
    params = jax.eval_shape(lambda: LLaDA2(config).init_params(jax.random.key(0)))
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): decay
        for path, decay in jax.tree_util.tree_leaves_with_path(decays(params))
    }
    kept = {path for path, decay in found.items() if not decay}
    assert kept == {
        "final_norm/scale",
        *(
            f"{group}/{name}"
            for group in ("dense_layers", "moe_layers")
            for name in (
                "attention_norm/scale",
                "mlp_norm/scale",
                "attention/query_norm/scale",
                "attention/key_norm/scale",
                "attention/query/bias",
                "attention/key/bias",
                "attention/value/bias",
            )
        ),
        "moe_layers/moe/router/expert_bias",
    }
    assert found["embed/embedding"]
    assert found["moe_layers/moe/router/kernel"]


def test_experts_below_the_mean_become_more_likely():
    bias = jnp.array([[0.5, -0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    load = jnp.array([[90.0, 3.0, 4.0, 3.0], [25.0, 25.0, 25.0, 25.0]])
    moved = balance_experts(bias, load, 0.1) - bias
    # signs -1 1 1 1 less their mean 0.5
    np.testing.assert_allclose(moved[0], [-0.15, 0.05, 0.05, 0.05], atol=1e-7)
    np.testing.assert_allclose(moved.sum(-1), 0, atol=1e-7)
    assert (moved[1] == 0).all(), "even load: nothing to do"
    assert (balance_experts(bias, load, 0.0) == bias).all()


def test_gradients_are_clipped_by_the_global_norm():
    params = {"embed": {"embedding": jnp.ones((2, 2))}, "final_norm": {"scale": jnp.ones(2)}}
    gradients = jax.tree.map(lambda p: 30.0 * jnp.ones_like(p), params)
    assert float(global_norm(gradients)) == pytest.approx(30 * 6**0.5)
    for limit, expected in ((1.0, 6**-0.5), (0.0, 30.0), (1e3, 30.0)):
        optimizer = make_optimizer(section(max_grad_norm=limit), 10)
        _, state = optimizer.update(gradients, optimizer.init(params), params)
        moment = optax.tree.get(state, "mu")
        np.testing.assert_allclose(moment["final_norm"]["scale"], 0.1 * expected, rtol=1e-5)


def test_expert_bias_is_left_alone_by_adamw():
    params = {"router": {"expert_bias": jnp.array([0.3, -0.3])}, "x": {"kernel": jnp.ones(3)}}
    optimizer = make_optimizer(section(lr_warmup_ratio=0.0, weight_decay=0.5), 10)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    assert (updates["router"]["expert_bias"] == 0).all()
    np.testing.assert_allclose(updates["x"]["kernel"], -0.5, rtol=1e-6)


def test_padding_row_loses_its_gradient():
    gradients = {"embed": {"embedding": jnp.ones((4, 2))}, "lm_head": {"kernel": jnp.ones((2, 4))}}
    without = without_padding_gradient(gradients, 2)
    assert without["embed"]["embedding"].sum(-1).tolist() == [2, 2, 0, 2]
    assert without["lm_head"] is gradients["lm_head"]
