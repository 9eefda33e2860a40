"""Split and joint passes, shared clean copies, packing, and who sees whom."""

import dataclasses

import flax.linen as nn
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from llada_jax.diffusion import Rows, clean_context, joint_pass, noisy_pass
from llada_jax.model import LLaDA2
from llada_jax.model.transformer import ModelOutput
from pallas_kernels import block_diffusion_packed
from tests.diffusion.tiny import (
    BLOCK,
    CONFIG,
    DENSE,
    LENGTH,
    MASK,
    PAD,
    ROWS,
    Plain,
    add_trees,
    as_noise,
    assert_trees_close,
    evaluate,
    kind_of,
    make_batch,
    make_noise,
    plain_cart,
    plain_weights,
    training_mask,
)

PAIRS = dataclasses.replace(
    CONFIG, complementary=True, loss_weight="inverse_t", mask_loss=2.0, edit_loss=0.5, cart_p=0.3
)
MDLM = dataclasses.replace(CONFIG, mdlm=True)


def rows_of(batch, block=BLOCK):
    return Rows.of(jnp.asarray(batch["positions"]), jnp.asarray(batch["document"]), block)


@jax.jit
def split_hidden(params, noisy, tokens, rows):
    """``(hidden, context)`` of one dense pass; the block size is in ``rows``."""
    context, _ = clean_context(DENSE, params, tokens, rows)
    return noisy_pass(DENSE, params, noisy, rows, context).hidden, context


def hidden_of(params, noisy, batch, block=BLOCK, tokens=None):
    tokens = batch["tokens"] if tokens is None else tokens
    hidden, context = split_hidden(params, noisy, tokens, rows_of(batch, block))
    return np.asarray(hidden), context


def test_split_equals_joint(dense, batch):
    """Loss, every mean and the gradient of two copies; of one, see ``Plain``'s comparison."""
    noise = make_noise(batch, 2)
    value, losses, gradient = evaluate(DENSE, PAIRS, dense, batch, noise)
    joint = dataclasses.replace(PAIRS, layout="joint")
    joint_value, joint_losses, joint_gradient = evaluate(DENSE, joint, dense, batch, noise)
    np.testing.assert_allclose(value, joint_value, rtol=1e-5)
    assert_trees_close(losses, joint_losses)
    assert_trees_close(gradient, joint_gradient, 1e-3)


@pytest.mark.parametrize("copies", [1, 2])
def test_split_equals_joint_in_hidden_states(dense, batch, copies):
    noisy = make_noise(batch, copies).noisy
    joint = jax.jit(lambda *args: joint_pass(DENSE, *args).hidden)
    expected = joint(dense, noisy, batch["tokens"], rows_of(batch))
    got, _ = hidden_of(dense, noisy, batch)
    assert got.shape == (ROWS, copies, LENGTH, 16)
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_copies_that_share_a_clean_one_equal_separate_runs(dense, batch):
    """Also: CE/t for the first copy, CE/(1-t) for its complement, a supervised token and copy.

    CART's weights are on.
    """
    noise = make_noise(batch, 2)
    first = noise.rates.at[3, 0].set(1e-5)  # 1/t is cut at 1000
    noise = noise.replace(rates=first.at[:, 1].set(1 - first[:, 0]))
    value, losses, gradient = evaluate(DENSE, PAIRS, dense, batch, noise)
    count = 2 * batch["supervised"].sum()
    parts = []
    for copy in range(2):
        noisy, rates = np.asarray(noise.noisy[:, copy]), np.asarray(noise.rates[:, copy])
        kinds, weights = plain_weights(PAIRS, noisy, batch, rates)
        weights *= np.where(kinds == "m2t", plain_cart(noisy == MASK, batch, PAIRS.cart_p), 1)
        parts.append(Plain(DENSE, dense, batch, noisy, weights / count))
    assert value > 0
    np.testing.assert_allclose(value, sum(float(p.value) for p in parts), rtol=1e-5)
    assert losses.terms["diffusion"].weight == count
    assert_trees_close(gradient, add_trees(*(p.gradient for p in parts)), 1e-3)


@given(st.lists(st.integers(1, 5), min_size=2, max_size=6), st.integers(0, 2**16))
@settings(max_examples=8)
def test_packed_documents_equal_the_same_alone(dense, blocks, seed):
    while sum(blocks) * BLOCK > LENGTH:
        blocks = blocks[:-1]
    lengths = [BLOCK * n for n in blocks]
    packed = make_batch([lengths] + [[]] * (ROWS - 1), seed)
    noise = make_noise(packed, seed=seed)
    alone = {name: np.zeros_like(x) for name, x in packed.items()}
    alone["tokens"][:] = PAD
    noisy = np.full_like(noise.noisy, PAD)
    for number, length in enumerate(lengths):
        inside = packed["document"][0] == number + 1
        for name in ("tokens", "positions", "supervised"):
            alone[name][number, :length] = packed[name][0, inside]
        alone["document"][number, :length] = 1
        noisy[number, 0, :length] = noise.noisy[0, 0, inside]
    value, losses, gradient = evaluate(DENSE, CONFIG, dense, packed, noise)
    value_alone, losses_alone, gradient_alone = evaluate(
        DENSE, CONFIG, dense, alone, as_noise(noisy)
    )
    assert losses.terms["diffusion"].weight > 0
    np.testing.assert_allclose(value, value_alone, rtol=1e-5)
    assert_trees_close(losses, losses_alone)
    assert_trees_close(gradient, gradient_alone, 1e-3)


class Recorder(LLaDA2):
    """Notes what it is asked, and answers nothing."""

    @nn.nowrap
    def apply(self, variables, *args, **kwargs):
        asked.append((args, kwargs))
        return ModelOutput(jnp.zeros((*args[0].shape, 16)), None)


asked: list = []


def test_mask_and_positions_of_the_joint_pass(dense, batch):
    asked.clear()
    noisy = make_noise(batch, 2).noisy
    recorder = Recorder(DENSE.config)
    joint_pass(recorder, dense, noisy, jnp.asarray(batch["tokens"]), rows_of(batch))
    ((tokens, positions), given) = asked[0]
    three = lambda name: np.tile(batch[name], (1, 3))  # noqa: E731
    np.testing.assert_array_equal(tokens[:, : 2 * LENGTH], noisy.reshape(ROWS, -1))
    np.testing.assert_array_equal(tokens[:, 2 * LENGTH :], batch["tokens"])
    np.testing.assert_array_equal(positions, three("positions"))
    np.testing.assert_array_equal(given["live"], three("document") > 0)
    pair = training_mask(batch, BLOCK)  # of [x_t ; x_0]
    noisy_noisy, noisy_clean = pair[:, :LENGTH, :LENGTH], pair[:, :LENGTH, LENGTH:]
    none = np.zeros_like(noisy_noisy)
    expected = np.block([
        [noisy_noisy, none, noisy_clean],
        [none, noisy_noisy, noisy_clean],
        [none, none, pair[:, LENGTH:, LENGTH:]],
    ])  # fmt: skip
    live = three("document") > 0  # what padding sees does not matter
    got = np.asarray(given["mask"].dense())
    np.testing.assert_array_equal(got[live], expected[live])


def visible(rows, query_copy, key_copy):
    def coordinates(copy, axis):
        block = jnp.expand_dims(rows.block, axis)
        return jnp.full_like(block, copy), block, jnp.expand_dims(rows.document, axis)

    return block_diffusion_packed(coordinates(query_copy, 2), coordinates(key_copy, 1))


def test_mask_as_it_is_drawn():
    """Two documents of four tokens, blocks of two."""
    positions, document = jnp.array([[0, 1, 2, 3, 0, 1]]), jnp.array([[1, 1, 1, 1, 2, 2]])
    rows = Rows.of(positions, document, 2)
    pictures = {
        (1, 1): "11.... 11.... ..11.. ..11.. ....11 ....11",
        (2, 2): "11.... 11.... ..11.. ..11.. ....11 ....11",
        (1, 2): "...... ...... ...... ...... ...... ......",
        (1, 0): "...... ...... 11.... 11.... ...... ......",
        (0, 1): "...... ...... ...... ...... ...... ......",
        (0, 0): "11.... 11.... 1111.. 1111.. ....11 ....11",
    }
    for (query, key), picture in pictures.items():
        expected = [[letter == "1" for letter in line] for line in picture.split()]
        np.testing.assert_array_equal(visible(rows, query, key)[0], expected)
    whole = Rows.of(positions, document, None)  # MDLM: a document is one block
    expected = ["1111..".replace(".", "0")] * 4 + ["000011"] * 2
    got = ["".join(str(int(v)) for v in line) for line in np.asarray(visible(whole, 1, 1)[0])]
    assert got == expected


def test_mdlm_is_a_bidirectional_forward(dense):
    """No clean copy: each document alone through the plain model, without any mask."""
    lengths = [16, 16]
    batch = make_batch([lengths] * ROWS)
    noise = make_noise(batch)
    _, losses, _ = evaluate(DENSE, MDLM, dense, batch, noise, gradient=False)
    noisy = np.asarray(noise.noisy[:, 0])
    kinds = kind_of(noisy, batch)
    total, start = 0.0, 0

    @jax.jit
    def forward(params, tokens):
        hidden = DENSE.apply({"params": params}, tokens).hidden
        return jax.nn.log_softmax(DENSE.apply({"params": params}, hidden, method="logits"))

    for length in lengths:
        inside = slice(start, start + length)
        log_p = forward(dense, noisy[:, inside])
        labels = batch["tokens"][:, inside, None]
        log_p = np.take_along_axis(np.asarray(log_p), labels, -1)[..., 0]
        total -= log_p[kinds[:, inside] == "m2t"].sum()
        start += length
    got = losses.metrics["m2t_loss"]
    np.testing.assert_allclose(got.total, total, rtol=1e-5)
    assert got.weight == (kinds == "m2t").sum()


def test_noisy_tokens_never_reach_the_clean_copy(dense, batch):
    """The clean half of a joint forward equals the clean pass, whatever the noisy half holds."""
    _, context = hidden_of(dense, make_noise(batch).noisy, batch)
    forward = jax.jit(
        lambda params, tokens, positions, mask: (
            DENSE.apply({"params": params}, tokens, positions, mask=mask).fresh
        )
    )
    mask = jnp.asarray(training_mask(batch, BLOCK))
    for seed in range(2):
        noisy = make_noise(batch, seed=seed).noisy[:, 0]
        tokens = jnp.concatenate([noisy, batch["tokens"]], axis=1)
        fresh = forward(dense, tokens, jnp.tile(batch["positions"], (1, 2)), mask)
        np.testing.assert_allclose(fresh.keys[:, :, :, LENGTH:], context.keys, atol=1e-4)
        np.testing.assert_allclose(fresh.values[:, :, :, LENGTH:], context.values, atol=1e-4)


@pytest.mark.parametrize("block", [1, BLOCK, LENGTH])
def test_labels_do_not_leak(dense, batch, block):
    """The clean tokens of a block, or later ones, do not change what its noisy copy predicts."""
    noisy = make_noise(batch).noisy
    before, _ = hidden_of(dense, noisy, batch, block)
    rng = np.random.default_rng(0)
    seen = 0
    for row, column in [(0, 0), (0, 9), (0, 14), (1, 0), (1, 13), (1, 30), (2, 2), (4, 17)]:
        tokens = batch["tokens"].copy()
        tokens[row, column] = (tokens[row, column] + rng.integers(1, PAD)) % PAD
        after, _ = hidden_of(dense, noisy, batch, block, tokens)
        moved = np.abs(after - before).max((1, 3)) > 1e-6
        document, place = batch["document"], batch["positions"] // block
        later = document == document[row, column]
        later &= (np.arange(ROWS) == row)[:, None]
        later &= place > place[row, column]
        np.testing.assert_array_equal(moved, later)
        seen += later.sum()
    assert seen > 0 or block == LENGTH


def test_block_of_one_is_autoregressive_from_the_mask_position(dense):
    """Prediction i: the clean tokens before i and one mask at i, under a causal mask."""
    batch = make_batch([[LENGTH]] * ROWS)
    noisy = jnp.full((ROWS, 1, LENGTH), MASK)
    got, _ = hidden_of(dense, noisy, batch, 1)
    causal = jnp.tril(jnp.ones((1, LENGTH, LENGTH), bool))
    forward = jax.jit(lambda p, tokens: DENSE.apply({"params": p}, tokens, mask=causal).hidden)
    for i in (0, 1, 7, LENGTH - 1):
        tokens = batch["tokens"].copy()
        tokens[:, i] = MASK
        expected = forward(dense, jnp.asarray(tokens))[:, i]
        np.testing.assert_allclose(got[:, 0, i], expected, atol=1e-4)


@pytest.mark.parametrize("block", [1, 4, 32])
def test_block_size_schedule(dense, batch, block):
    """Every block size from autoregressive to whole rows, against the plain forward."""
    noisy = make_noise(batch).noisy
    got, _ = hidden_of(dense, noisy, batch, block)
    forward = jax.jit(
        lambda params, *args, mask: DENSE.apply({"params": params}, *args, mask=mask).hidden
    )
    tokens = jnp.concatenate([noisy[:, 0], batch["tokens"]], axis=1)
    positions = jnp.tile(batch["positions"], (1, 2))
    mask = jnp.asarray(training_mask(batch, block))
    expected = forward(dense, tokens, positions, mask=mask)[:, :LENGTH]
    np.testing.assert_allclose(got[:, 0], expected, atol=1e-4)


def test_one_block_a_row_is_mdlm(dense, batch):
    """The last step of the schedule: no noisy token sees a clean one."""
    noisy = make_noise(batch).noisy
    got, _ = hidden_of(dense, noisy, batch, LENGTH)
    free = jax.jit(lambda *args: noisy_pass(DENSE, *args, None).hidden)
    np.testing.assert_allclose(got, free(dense, noisy, rows_of(batch, None)), atol=1e-4)
