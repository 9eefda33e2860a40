"""Logits, layers, router, loss and gradients of the released PyTorch code."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from llada_jax.checkpoint import save_hf
from llada_jax.model import init_cache, write_cache
from llada_jax.model.router import route
from pallas_kernels import WindowMask, block_causal, block_diffusion


@pytest.fixture(scope="module")
def forward(golden):
    return np.load(golden / "forward.npz")


@pytest.fixture(scope="module")
def uncached(counting, forward):
    model, params = counting
    ids, block = forward["input_ids"], int(forward["block_length"])
    place = jnp.arange(ids.shape[1])
    mask = block_causal(place[:, None], place[None, :], block)[None]

    @jax.jit
    def run(params, ids):
        out = model.apply({"params": params}, ids, mask=mask, return_layers=True)
        return out, model.apply({"params": params}, out.hidden, method="logits")

    return run(params, ids)


def test_logits(uncached, forward):
    np.testing.assert_allclose(uncached[1], forward["logits"], atol=2e-4)


def test_layers(uncached, forward):
    for i, layer in enumerate(uncached[0].layers):
        np.testing.assert_allclose(layer, forward[f"layer_{i}"], atol=2e-4)


def test_router(counting, forward):
    model, params = counting
    weights = jax.tree.map(lambda w: w[0], params["moe_layers"]["moe"]["router"])
    experts, gates = route(
        jnp.asarray(forward["router_hidden"]),
        weights["kernel"],
        weights["expert_bias"],
        model.config,
    )
    # The released code leaves the order of the chosen experts open.
    ours, theirs = np.argsort(experts, axis=1), np.argsort(forward["router_topk_idx"], axis=1)
    np.testing.assert_array_equal(
        np.take_along_axis(np.asarray(experts), ours, 1),
        np.take_along_axis(forward["router_topk_idx"], theirs, 1),
    )
    np.testing.assert_allclose(
        np.take_along_axis(np.asarray(gates), ours, 1),
        np.take_along_axis(forward["router_topk_weight"], theirs, 1),
        rtol=1e-5,
    )


def test_cached_equals_uncached(counting, forward, uncached):
    """Block after block over the cache, and the same with two blocks in one prefill forward."""
    model, params = counting
    ids, block = forward["input_ids"], int(forward["block_length"])

    @jax.jit
    def run(params, ids, start, cache):
        length = ids.shape[1]
        mask = WindowMask(causal=jnp.ones(len(ids), bool), block_length=block)
        out = model.apply(
            {"params": params},
            ids,
            start[:, None] + jnp.arange(length),
            mask=mask,
            cache=cache,
            cache_length=start,
        )
        return out.hidden, write_cache(cache, out.fresh, start, jnp.ones(ids.shape, bool))

    for widths in ([1, 1, 1], [2, 1], [1, 2]):
        cache, start = init_cache(model.config, 2, 128, jnp.float32), 0
        for width in widths:
            span = ids[:, start : start + width * block]
            hidden, cache = run(params, span, jnp.full(2, start), cache)
            expected = uncached[0].hidden[:, start : start + width * block]
            np.testing.assert_allclose(hidden, expected, atol=2e-5)
            start += width * block


@pytest.fixture(scope="module")
def training(counting, golden):
    model, params = counting
    data = np.load(golden / "train.npz")
    x0, xt, loss_mask = data["x0"], data["xt"], data["loss_mask"]
    length = x0.shape[1]
    place = jnp.arange(2 * length)
    mask = block_diffusion(place[:, None], place[None, :], length, int(data["block_length"]))
    tokens = jnp.concatenate([xt, x0], axis=1)
    positions = jnp.broadcast_to(place % length, tokens.shape)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        out = model.apply({"params": params}, tokens, positions, mask=mask[None])
        logits = model.apply({"params": params}, out.hidden[:, :length], method="logits")
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), x0[..., None], axis=-1)[..., 0]
        return -(log_p * loss_mask).sum() / loss_mask.sum(), logits

    (value, logits), gradients = loss(params)
    return data, float(value), logits, gradients


def test_loss_and_logits(training):
    data, value, logits, _ = training
    assert abs(value - float(data["loss"])) < 1e-5
    np.testing.assert_allclose(logits, data["logits"], atol=2e-4)


def test_gradients(training, counting, golden, tmp_path):
    """Every tensor's gradient norm, and the small tensors' gradients entry by entry."""
    data, _, _, gradients = training
    save_hf(tmp_path / "gradients", counting[0].config, gradients)
    ours = load_file(tmp_path / "gradients" / "model.safetensors")
    norms = json.loads((golden / "grad_norms.json").read_text())
    assert set(norms) <= set(ours)
    assert len(norms) > 100
    for name, norm in norms.items():
        np.testing.assert_allclose(np.linalg.norm(ours[name]), norm, rtol=1e-3, atol=1e-8)
    entries = [key for key in data.files if key.startswith("grad/")]
    assert entries
    for key in entries:
        error = np.linalg.norm(ours[key[5:]] - data[key]) / np.linalg.norm(data[key])
        assert error < 1e-3, key
