"""One step: cut up, spread out and in bfloat16 it is the step of one large batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llada_jax.config import ModelConfig
from llada_jax.diffusion import DiffusionConfig
from llada_jax.model import LLaDA2
from llada_jax.parallel import make_mesh
from llada_jax.training.config import TrainSection
from llada_jax.training.optimizer import make_optimizer
from llada_jax.training.state import new_state, state_shardings
from llada_jax.training.step import batch_sharding, make_step
from tests.training.tiny import DENSE, MOE

PLAIN = DiffusionConfig(block_size=8)
FULL = DiffusionConfig(
    block_size=8, confidence_beta=0.5, z_loss=0.1, loss_weight="inverse_t", layout="joint"
)
MODELS = {"dense": ModelConfig.from_hf(DENSE), "moe": ModelConfig.from_hf(MOE)}
OBJECTIVES = {"dense": PLAIN, "moe": FULL}
LR, DECAY, RATE, BETA1 = 1e-2, 0.1, 1e-2, 0.9


@functools.cache
def weights(name: str):
    """Drawn weights, with some for the padding and with uneven experts."""
    params = LLaDA2(MODELS[name]).init_params(jax.random.key(1))
    return jax.tree.map(np.asarray, params)


@functools.cache
def compiled(name: str, axes=(), dtype=jnp.float32, rate=RATE, train_pad=False):
    """The step function and a function that makes its first state."""
    sizes = dict(axes)
    count = int(np.prod([*sizes.values(), 1]))
    mesh = make_mesh(**sizes, devices=jax.devices()[:count])
    section = TrainSection(
        output_dir="-",
        max_steps=100,
        lr=LR,
        lr_min=0.0,
        lr_warmup_ratio=0.0,
        lr_decay_style="constant",
        beta1=BETA1,
        weight_decay=DECAY,
        max_grad_norm=0.0,  # so that the first moment tells the gradient
        expert_bias_update_rate=rate,
        train_pad_embedding=train_pad,
    )
    optimizer = make_optimizer(section, 100)
    config = MODELS[name]
    shardings = state_shardings(config, optimizer, mesh)
    model = LLaDA2(config, dtype=dtype)
    step = make_step(model, OBJECTIVES[name], section, optimizer, shardings, mesh)
    host = jax.device_get(new_state(weights(name), optimizer, 0, shardings))

    def fresh():
        return jax.tree.map(jax.device_put, host, shardings)

    return step, fresh, batch_sharding(mesh)


def make_batch(*, supervised=True, empty=False):
    """Eight rows: two documents of random length each, then padding; the last row is short."""
    rng = np.random.default_rng(0)
    rows, length = 8, 32
    batch = {
        "tokens": rng.integers(97, 123, (rows, length)),
        "positions": np.zeros((rows, length), int),
        "document": np.zeros((rows, length), int),
        "supervised": np.zeros((rows, length), bool),
    }
    for row in range(0 if empty else rows):
        first = 8 if row == 7 else 16
        second = 0 if row == 7 else 8
        start = 0
        for number, size in enumerate((first, second), 1):
            inside = slice(start, start + size)
            batch["tokens"][row, start + size - 2 : start + size] = 256
            batch["positions"][row, inside] = np.arange(size)
            batch["document"][row, inside] = number
            batch["supervised"][row, start + 3 : start + size] = supervised
            start += size
    batch["tokens"][batch["document"] == 0] = 256
    kind = {np.dtype(int): np.int32, np.dtype(bool): bool}
    return {name: x.astype(kind[x.dtype]) for name, x in batch.items()}


def run(step, fresh, sharding, batch=None, accumulation=1):
    """One step: metrics, gradients, parameters, the new state."""
    batch = make_batch() if batch is None else batch
    cut = {k: x.reshape(accumulation, -1, *x.shape[1:]) for k, x in batch.items()}
    state, metrics = step(fresh(), jax.device_put(cut, sharding))
    moment = optax.tree.get(state.opt_state, "mu")
    gradients = jax.tree.map(lambda m: np.asarray(m) / (1 - BETA1), moment)
    return jax.device_get(metrics), gradients, jax.device_get(state.params), state


def flat(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_same_step(a, b):
    for name, value in a[0].items():
        np.testing.assert_allclose(b[0][name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    gradients, others = flat(a[1]), flat(b[1])
    for name, gradient in gradients.items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(
            others[name], gradient, rtol=1e-5, atol=1e-5 * scale, err_msg=name
        )
    params, others = flat(a[2]), flat(b[2])
    for name, gradient in gradients.items():
        # The first step of Adam is lr * sign(gradient): where there is none, noise decides.
        clear = np.abs(gradient) > 1e-4 * np.abs(gradient).max()
        if not clear.any():  # the router's expert_bias
            clear = np.ones_like(clear)
        np.testing.assert_allclose(
            others[name][clear], params[name][clear], rtol=1e-5, atol=1e-3 * LR, err_msg=name
        )


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_accumulated_is_one_large_batch(name):
    made = compiled(name)
    whole, cut = run(*made), run(*made, accumulation=4)
    assert np.isfinite(whole[0]["loss"])
    assert ("confidence_term" in whole[0]) == ("z_term" in whole[0]) == (name == "moe")
    assert_same_step(whole, cut)


@pytest.mark.parametrize(
    ("name", "axes"),
    [("moe", (("data", 2), ("fsdp", 2), ("expert", 2))), ("dense", (("fsdp", 8),))],
)
def test_a_mesh_computes_what_one_device_does(name, axes):
    one, many = run(*compiled(name)), run(*compiled(name, axes))
    spread = many[3].params["embed"]["embedding"].sharding.spec
    assert spread[1] == "fsdp"
    assert_same_step(one, many)


def test_experts_are_balanced_outside_the_optimizer():
    metrics, gradients, params, _ = run(*compiled("moe"))
    router = params["moe_layers"]["moe"]["router"]
    moved = router["expert_bias"] - weights("moe")["moe_layers"]["moe"]["router"]["expert_bias"]
    assert (gradients["moe_layers"]["moe"]["router"]["expert_bias"] == 0).all()
    assert metrics["expert_imbalance"] > 1
    assert np.abs(moved).max() > 0.1 * RATE
    assert np.abs(moved).max() <= 2 * RATE
    np.testing.assert_allclose(moved.sum(-1), 0, atol=1e-7)


def test_padding_learns_nothing_unless_asked_to():
    pad = MODELS["moe"].pad_token_id
    _, gradients, params, _ = run(*compiled("moe"))
    table = gradients["embed"]["embedding"]
    assert (table[pad] == 0).all()
    assert (table[97:123] != 0).any(-1).all(), "the others do learn"
    assert (gradients["lm_head"]["kernel"][:, pad] != 0).any(), "the end is still predicted"
    np.testing.assert_allclose(
        params["embed"]["embedding"][pad],
        weights("moe")["embed"]["embedding"][pad] * (1 - LR * DECAY),
        rtol=1e-6,
    )


def test_bfloat16_computes_and_float32_remembers():
    """And with this variant: no balancing at rate 0, and a padding row that learns."""
    exact = run(*compiled("moe"))
    metrics, gradients, params, state = run(
        *compiled("moe", dtype=jnp.bfloat16, rate=0.0, train_pad=True)
    )
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floats} == {jnp.dtype("float32")}
    assert metrics["loss"] == pytest.approx(exact[0]["loss"], rel=2e-2)
    assert metrics["loss"] != exact[0]["loss"]
    router = params["moe_layers"]["moe"]["router"]
    before = weights("moe")["moe_layers"]["moe"]["router"]
    assert (router["expert_bias"] == before["expert_bias"]).all()
    moved = np.abs(router["kernel"] - before["kernel"])
    assert 0 < np.median(moved) < 2 * LR, "steps smaller than bfloat16 could hold are kept"
    assert (gradients["embed"]["embedding"][MODELS["moe"].pad_token_id] != 0).any()


@pytest.mark.parametrize("name", ["dense", "moe"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_nothing_to_learn(name, accumulation):
    """Not a supervised token (dense), not a token at all (moe): only the decay acts."""
    batch = make_batch(supervised=False, empty=name == "moe")
    metrics, gradients, params, _ = run(*compiled(name), batch, accumulation)
    assert metrics["loss"] == metrics["grad_norm"] == metrics["m2t_tokens"] == 0
    assert all((g == 0).all() for g in jax.tree.leaves(gradients))
    before = flat(weights(name))
    for path, value in flat(params).items():
        factor = 1.0 if path.endswith(("scale", "bias")) else 1 - LR * DECAY
        np.testing.assert_allclose(value, before[path] * np.float32(factor), rtol=1e-6)


def test_loss_goes_down_and_one_program_serves_all_steps():
    step, fresh, sharding = compiled("dense")
    before = step._cache_size()
    batch = make_batch()
    batch["tokens"] = np.where(batch["tokens"] < 256, 97 + batch["positions"] % 26, 256).astype(
        "i4"
    )
    placed = jax.device_put({k: x[None] for k, x in batch.items()}, sharding)
    state, losses = fresh(), []
    for _ in range(40):
        state, metrics = step(state, placed)
        losses.append(float(metrics["loss"]))
    assert int(state.step) == 40
    assert np.mean(losses[-5:]) < 0.2 * losses[0]
    assert step._cache_size() == max(before, 1)


def test_steps_draw_different_noise_and_equal_states_the_same():
    made = compiled("dense")
    a, b = run(*made), run(*made)
    assert a[0]["loss"].tobytes() == b[0]["loss"].tobytes()
    step, fresh, sharding = made
    placed = jax.device_put({k: x[None] for k, x in make_batch().items()}, sharding)
    state, first = step(fresh(), placed)
    _, second = step(state, placed)
    assert first["m2t_tokens"] != second["m2t_tokens"]


def test_a_tied_padding_row_learns_as_output():
    config = ModelConfig.from_hf(DENSE | {"tie_word_embeddings": True})
    MODELS["tied"], OBJECTIVES["tied"] = config, PLAIN
    table = run(*compiled("tied"))[1]["embed"]["embedding"]
    assert (table[config.pad_token_id] != 0).any()
