"""The objective against the released code's numbers, and against plain computations."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from llada_jax.checkpoint import save_hf
from llada_jax.diffusion import DiffusionConfig, Mean, Rows, objective
from llada_jax.diffusion.objective import _embedding_noise, cart_weights
from llada_jax.model.weights import flatten_specs, weight_specs
from llada_jax.parallel import make_mesh, named_sharding
from tests.diffusion.tiny import (
    BLOCK,
    CONFIG,
    DENSE,
    MASK,
    PAD,
    Plain,
    add_trees,
    as_noise,
    assert_trees_close,
    evaluate,
    make_noise,
    plain_cart,
    plain_weights,
    training_mask,
)

# ---------------------------------------------------------------- the released code


TINY = 1e-12


def largest(tree):
    return max(np.abs(np.asarray(leaf)).max() for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def released(golden):
    """Eight rows, so that they can be spread over devices; the loss is that of the first two."""
    data = np.load(golden / "train.npz")
    tile = lambda x: np.tile(x, (4, 1))  # noqa: E731
    length = data["x0"].shape[1]
    batch = {
        "tokens": tile(data["x0"].astype(np.int32)),
        "positions": tile(np.broadcast_to(np.arange(length, dtype=np.int32), (2, length))),
        "document": np.ones((8, length), np.int32),
        "supervised": tile(data["loss_mask"]) & (np.arange(8) < 2)[:, None],
    }
    config = DiffusionConfig(  # the z-loss is there to be seen, not to be felt
        block_size=int(data["block_length"]), keep_loss=0.0, loss_chunk=24, z_loss=TINY
    )
    return data, batch, as_noise(tile(data["xt"])[:, None]), config


def test_loss_and_gradients_of_the_released_code(counting, released, golden, tmp_path):
    model, params = counting
    data, batch, noise, config = released
    value, losses, gradient = evaluate(model, config, params, batch, noise)
    assert abs(float(value) - float(data["loss"])) < 1e-5
    assert losses.terms["diffusion"].weight == data["loss_mask"].sum()
    save_hf(tmp_path / "gradient", model.config, gradient)
    ours = load_file(tmp_path / "gradient" / "model.safetensors")
    norms = json.loads((golden / "grad_norms.json").read_text())
    for name, norm in norms.items():
        np.testing.assert_allclose(np.linalg.norm(ours[name]), norm, rtol=1e-3, atol=1e-8)


def test_without_keep_weight_right_tokens_have_no_gradient(counting, released):
    model, params = counting
    _, batch, _, config = released
    noise = as_noise(batch["tokens"][:, None])
    _, losses, gradient = evaluate(model, config, params, batch, noise)
    assert losses.terms["diffusion"].value() == 0
    assert losses.metrics["keep_loss"].weight == batch["supervised"].sum()
    assert losses.metrics["keep_loss"].total > 0
    assert largest(gradient) < 1e3 * TINY


@pytest.fixture(scope="module")
def uneven(released):
    """Rows that supervise different numbers of tokens, and one of padding."""
    data, batch, noise, config = released
    rng = np.random.default_rng(0)
    chosen = rng.random(batch["tokens"].shape) < np.linspace(0.1, 1, 8)[:, None]
    batch = batch | {
        "supervised": np.tile(data["loss_mask"], (4, 1)) & chosen,
        "document": batch["document"] * (np.arange(8) != 5)[:, None],
    }
    return batch, noise, config


def test_eight_devices_equal_one(counting, uneven):
    """Rows over ``data`` and ``fsdp``, weights over ``fsdp``: the same losses and gradient.

    A mean of the devices' means would be another.
    """
    model, params = counting
    batch, noise, config = uneven
    mesh = make_mesh(data=4, fsdp=2)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    specs = flatten_specs(weight_specs(model.config))
    placed = jax.tree_util.tree_map_with_path(
        lambda path, w: jax.device_put(
            w, named_sharding(specs["/".join(k.key for k in path)].axes, w.shape, mesh)
        ),
        params,
    )
    assert not placed["embed"]["embedding"].sharding.is_fully_replicated
    value, losses, gradient = evaluate(model, config, params, batch, noise)
    sharded = evaluate(model, config, placed, *jax.device_put((batch, noise), rows))
    np.testing.assert_allclose(sharded[0], value, rtol=1e-5)
    assert_trees_close(jax.device_get(sharded[1]), losses)
    assert_trees_close(jax.device_get(sharded[2]), gradient, 1e-3)


def test_parts_of_a_batch_add_up(counting, uneven):
    """Losses of the upper and the lower rows, joined, are those of all rows."""
    model, params = counting
    batch, noise, config = uneven
    whole = evaluate(model, config, params, batch, noise)[1]
    parts = []
    for rows in (slice(0, 3), slice(3, None)):
        document = np.zeros_like(batch["document"])
        document[rows] = batch["document"][rows]
        part = batch | {"document": document}
        parts.append(evaluate(model, config, params, part, noise)[1])
    assert_trees_close(parts[0] + parts[1], whole)


# ---------------------------------------------------------------- what a token counts


def test_masks_edits_and_kept_tokens(dense, batch):
    noise = make_noise(batch)
    noisy = np.asarray(noise.noisy[:, 0])
    value, losses, gradient = evaluate(DENSE, CONFIG, dense, batch, noise)
    kinds, weights = plain_weights(CONFIG, noisy, batch)
    plain = Plain(DENSE, dense, batch, noisy, weights / weights.sum())
    assert value > 0
    np.testing.assert_allclose(value, plain.value, rtol=1e-5)
    assert set(losses.terms) == {"diffusion"}
    np.testing.assert_allclose(losses.terms["diffusion"].weight, weights.sum(), rtol=1e-5)
    assert_trees_close(gradient, plain.gradient, 1e-3)
    for kind in ("m2t", "t2t", "keep"):
        here = kinds == kind
        assert here.sum() > 5
        loss, accuracy = losses.metrics[f"{kind}_loss"], losses.metrics[f"{kind}_accuracy"]
        np.testing.assert_allclose(loss.value(), -plain.log_prob[here].mean(), rtol=1e-5)
        right = plain.logits.argmax(-1)[here] == batch["tokens"][here]
        np.testing.assert_allclose(accuracy.value(), right.mean(), atol=1e-6)
        assert loss.weight == accuracy.weight == here.sum()


def test_inverse_t_is_an_unbiased_bound():
    """A constant loss C a token gives C on average, whatever t."""
    rng = np.random.default_rng(0)
    t = rng.uniform(0.05, 1, 200_000)
    masked = rng.random(t.shape) < t
    assert abs((masked / t).mean() - 1) < 0.01


# ---------------------------------------------------------------- rounds and CAP

noise_of = jax.jit(_embedding_noise, static_argnums=(0, 4))

ROUNDS = dataclasses.replace(
    CONFIG,
    complementary=True,
    rounds=3,
    loss_weight="inverse_t",
    confidence_beta=0.5,
    confidence_temperature=0.5,
    mask_noise_steps=10,
)


def next_draft(noisy, plain, batch, fill_above, edit_above):
    """Γ and Δ, one position at a time."""
    draft, moves = noisy.copy(), {"fill": 0, "edit": 0, "left": 0}
    for place in zip(*np.nonzero(batch["supervised"]), strict=True):
        scores = plain.logits[place].astype(np.float64)
        scores[MASK] = -np.inf
        p = np.exp(scores - scores.max())
        p /= p.sum()
        filling = noisy[place] == MASK
        if p.max() > (fill_above if filling else edit_above)[place]:
            moves["fill" if filling else "edit"] += 1
            draft[place] = p.argmax()
        else:
            moves["left"] += 1
    return draft, moves


@pytest.fixture(scope="module")
def rounds(dense, batch):
    """Three rounds of two copies by the objective, and by plain forwards."""
    noise = make_noise(batch, 2, rounds=3, seed=1)
    # The labels of the first blocks are what the model says there, so that it is right sometimes.
    draft = np.asarray(noise.noisy)
    masked = jnp.asarray(draft == MASK)
    added = np.asarray(noise_of(ROUNDS, dense, masked, noise.row_keys, 0, 4))
    said = Plain(DENSE, dense, batch, draft[:, 0], added=added[:, 0]).logits.argmax(-1)
    tokens = np.where(batch["positions"] < BLOCK, said, batch["tokens"]).astype(np.int32)
    batch = batch | {"tokens": tokens}
    got = evaluate(DENSE, ROUNDS, dense, batch, noise, step=4)
    forwards, drafts, moves = {}, {}, {"fill": 0, "edit": 0, "left": 0}
    for turn in range(3):
        added = np.asarray(
            noise_of(ROUNDS, dense, jnp.asarray(draft == MASK), noise.row_keys, turn, 4)
        )
        drafts[turn], following = draft, draft.copy()
        for copy in range(2):
            forwards[turn, copy] = functools.partial(
                Plain, DENSE, dense, batch, draft[:, copy], temperature=0.5, added=added[:, copy]
            )
            if turn < 2:
                above = (np.asarray(a[:, turn, copy]) for a in (noise.fill_above, noise.edit_above))
                plain = forwards[turn, copy]()
                following[:, copy], moved = next_draft(draft[:, copy], plain, batch, *above)
                moves = {name: moves[name] + moved[name] for name in moves}
        draft = following
    return batch, noise, got, forwards, drafts, moves


def test_each_round_learns_from_the_draft_of_the_round_before(rounds):
    batch, noise, (value, losses, gradient), forwards, drafts, moves = rounds
    assert min(moves.values()) > 20  # all rules were at work
    plain = {place: forward() for place, forward in forwards.items()}
    weights, right, counts = {}, {}, dict.fromkeys(("m2t", "t2t", "keep"), 0)
    for turn, copy in plain:
        rates = np.asarray(noise.rates[:, copy]) if turn == 0 else None
        kinds, weights[turn, copy] = plain_weights(ROUNDS, drafts[turn][:, copy], batch, rates)
        best = plain[turn, copy].logits.argmax(-1)
        right[turn, copy] = (kinds == "m2t") & (best == batch["tokens"])
        for kind in counts:
            counts[kind] += (kinds == kind).sum()
    for kind, count in counts.items():
        assert losses.metrics[f"{kind}_loss"].weight == count
    later = sum(w.sum() for (turn, _), w in weights.items() if turn)
    weight = 2 * batch["supervised"].sum() + later
    np.testing.assert_allclose(losses.terms["diffusion"].weight, weight, rtol=1e-5)
    total = sum(-(w * plain[place].log_prob).sum() for place, w in weights.items())
    np.testing.assert_allclose(losses.terms["diffusion"].total, total, rtol=1e-4)

    sure = sum(r.sum() for r in right.values())
    assert sure > 20
    entropy = sum(plain[place].entropy[r].sum() for place, r in right.items())
    confidence = losses.terms["confidence"]
    assert confidence.weight == sure
    np.testing.assert_allclose(confidence.total, 0.5 * entropy, rtol=1e-4)
    np.testing.assert_allclose(losses.metrics["entropy"].value(), entropy / sure, rtol=1e-4)
    np.testing.assert_allclose(value, total / weight + 0.5 * entropy / sure, rtol=1e-4)

    parts = [
        forward(weights[place] / weight, 0.5 * right[place] / sure)
        for place, forward in forwards.items()
    ]
    assert_trees_close(gradient, add_trees(*(p.gradient for p in parts)), 1e-3)


def test_a_mask_is_never_drafted(rounds):
    drafts = rounds[4]
    for turn in range(2):
        assert not ((drafts[turn + 1] == MASK) & (drafts[turn] != MASK)).any()


def test_no_confident_tokens(dense, batch):
    """Nothing is masked, so CAP's set is empty: 0, not NaN."""
    noise = make_noise(batch, 2, rounds=3)
    noise = noise.replace(noisy=jnp.tile(batch["tokens"][:, None], (1, 2, 1)))
    value, losses, gradient = evaluate(DENSE, ROUNDS, dense, batch, noise)
    assert losses.terms["confidence"].weight == 0
    assert losses.terms["confidence"].value() == 0
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


# ---------------------------------------------------------------- nothing to learn


@pytest.mark.parametrize("what", ["unsupervised", "padding"])
@pytest.mark.parametrize("experts", [False, True])
def test_nothing_to_learn(dense, counting, released, batch, what, experts):
    if experts:
        model, params = counting
        _, batch, noise, config = released
    else:
        model, params, noise, config = DENSE, dense, make_noise(batch, 2, rounds=3), ROUNDS
    if what == "unsupervised":
        batch = batch | {"supervised": np.zeros_like(batch["supervised"])}
    else:  # padding is never supervised, whatever is said
        batch = {name: np.zeros_like(x) for name, x in batch.items()}
        batch["supervised"][:] = True
    value, losses, gradient = evaluate(model, config, params, batch, noise)
    assert losses.terms["diffusion"].value() == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(losses))
    if experts and what == "unsupervised":  # the router's z-loss needs no supervision
        assert largest(gradient) < 1e3 * TINY
    else:
        assert value == 0
        assert largest(gradient) == 0
    if experts:
        assert np.asarray(losses.load).any() == (what != "padding")


def test_mean():
    empty = Mean(jnp.float32(0), jnp.float32(0))
    assert empty.value() == 0
    joined = Mean(jnp.float32(6), jnp.float32(2)) + Mean(jnp.float32(1), jnp.float32(5)) + empty
    assert joined.value() == 1
    slope = jax.grad(lambda total: Mean(total, jnp.float32(0)).value())(jnp.float32(0))
    assert slope == 0


# ---------------------------------------------------------------- router


def test_router_load_and_z_loss(counting, uneven):
    """Both halves count, padding does not."""
    model, params = counting
    batch, noise, config = uneven
    _, losses, _ = evaluate(model, config, params, batch, noise)
    mask = jnp.asarray(training_mask(batch, config.block_size))
    tokens = jnp.concatenate([noise.noisy[:, 0], batch["tokens"]], axis=1)
    positions, live = (np.tile(x, (1, 2)) for x in (batch["positions"], batch["document"] > 0))

    @jax.jit
    def router_of(params):
        return model.apply(
            {"params": params}, tokens, jnp.asarray(positions), mask=mask, live=jnp.asarray(live)
        ).router

    router = router_of(params)
    np.testing.assert_array_equal(losses.load, router.load)
    count, layers = live.sum(), model.config.num_moe_layers
    np.testing.assert_array_equal(
        losses.load.sum(-1), [model.config.num_experts_per_tok * count] * layers
    )
    z = losses.terms["z"]
    assert z.weight == layers * count
    np.testing.assert_allclose(
        z.value(), config.z_loss * router.z.sum() / (layers * count), rtol=1e-5
    )


def test_a_dense_model_has_no_router(dense, batch):
    config = dataclasses.replace(CONFIG, z_loss=0.01)
    losses = jax.eval_shape(
        lambda *args: objective(DENSE, config, *args), dense, batch, make_noise(batch)
    )
    assert losses.load is None
    assert set(losses.terms) == {"diffusion"}


# ---------------------------------------------------------------- CART


@pytest.mark.parametrize("with_context", [True, False])
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_cart_weights(batch, with_context, p):
    masked = np.asarray(make_noise(batch, 2).noisy) == MASK
    rows = Rows.of(
        jnp.asarray(batch["positions"]),
        jnp.asarray(batch["document"]),
        BLOCK if with_context else None,
    )
    got = jax.jit(lambda m: cart_weights(m, rows, p, with_context=with_context))(masked)
    for copy in range(2):
        expected = plain_cart(masked[:, copy], batch, p, with_context)
        np.testing.assert_allclose(got[:, copy], expected, atol=1e-6)


# ---------------------------------------------------------------- embedding noise

FADING = dataclasses.replace(CONFIG, mask_noise_steps=10)


def test_embedding_noise(dense, batch):
    noise = make_noise(batch, 2)
    masked = noise.noisy == MASK
    table = np.asarray(dense["embed"]["embedding"])
    make = lambda turn, step: noise_of(FADING, dense, masked, noise.row_keys, turn, step)  # noqa: E731
    first, half, later, round_1 = make(0, 0), make(0, 5), make(0, 10), make(1, 0)
    shown = np.asarray(masked)
    assert not np.asarray(first)[~shown].any()
    norms = np.linalg.norm(np.asarray(first)[shown], axis=-1)
    assert abs(norms.mean() / np.linalg.norm(table, axis=-1).mean() - 1) < 0.1
    np.testing.assert_allclose(half, first / 2, rtol=1e-5)
    assert not np.asarray(later).any()
    assert not np.asarray(make(0, 99)).any()
    assert (np.asarray(round_1) != first)[shown].all()
    assert len(np.unique(first)) > 0.99 * shown.sum() * 16  # no two positions share theirs
    assert _embedding_noise(CONFIG, dense, masked, noise.row_keys, 0, 0) is None


def test_embedding_noise_in_a_joint_pass(dense, batch):
    """Only the noisy half gets it; the split pass has it in the rounds above."""
    config = dataclasses.replace(FADING, layout="joint")
    noise = make_noise(batch)
    noisy = np.asarray(noise.noisy[:, 0])
    _, weights = plain_weights(CONFIG, noisy, batch)
    masked = noise.noisy == MASK
    for step in (0, 10):
        added = noise_of(config, dense, masked, noise.row_keys, 0, step)
        plain = Plain(DENSE, dense, batch, noisy, weights, added=np.asarray(added[:, 0]))
        _, losses, _ = evaluate(DENSE, config, dense, batch, noise, step, gradient=False)
        np.testing.assert_allclose(losses.terms["diffusion"].total, plain.value, rtol=1e-5)


def test_constants():
    """What the tiny batches rely on."""
    assert DENSE.config.mask_token_id == MASK
    assert DENSE.config.pad_token_id == PAD
