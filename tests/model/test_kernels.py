"""The model on its Pallas kernels, interpreted on CPU, equals the model on XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from llada_jax.model import LLaDA2, init_cache, quantize_params, write_cache
from pallas_kernels import WindowMask
from tests.model.test_experts import make_config

CONFIG = make_config(num_hidden_layers=2, first_k_dense_replace=1)
BLOCK = 4


def forward(kernels, params, cache_dtype=jnp.float32):
    """A prefill of two blocks and one step on the third: hidden states, best tokens."""
    model = LLaDA2(CONFIG, kernels=kernels)
    tokens = jax.random.randint(jax.random.key(1), (2, 3 * BLOCK), 0, CONFIG.vocab_size)

    def run(params):
        cache = init_cache(CONFIG, 2, 32, cache_dtype)
        start, width = jnp.zeros(2, jnp.int32), 2 * BLOCK
        causal = WindowMask(causal=jnp.ones(2, bool), block_length=BLOCK)
        results = []
        for at, width, mask in ((0, 2 * BLOCK, causal), (2 * BLOCK, BLOCK, None)):
            start = jnp.array([at, at])
            out = model.apply(
                {"params": params},
                tokens[:, at : at + width],
                start[:, None] + jnp.arange(width),
                mask=mask,
                cache=cache,
                cache_length=start,
                live=jnp.ones((2, width), bool),
            )
            cache = write_cache(cache, out.fresh, start, jnp.ones((2, width), bool))
            nothing = jnp.full((2, width), -1)
            best = model.apply(
                {"params": params},
                out.hidden,
                nothing.at[:, 0].set(CONFIG.mask_token_id),
                nothing,
                jnp.zeros((2, width)),
                method="confidence",
            )
            results.append((out.hidden, best.token, best.probability, best.entropy))
        return results

    if kernels == "xla":
        return jax.jit(run)(params)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        return jax.jit(run)(params)


@pytest.mark.parametrize(("quantization", "cache_dtype"), [(None, jnp.int8), ("int4", jnp.float32)])
def test_pallas_equals_xla(quantization, cache_dtype):
    params = LLaDA2(CONFIG).init_params(jax.random.key(0))
    if quantization is not None:
        params = quantize_params(params, CONFIG, quantization)
    ours, theirs = (forward(k, params, cache_dtype) for k in ("pallas", "xla"))
    for got, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5)


def test_int8_cache_is_close_to_a_float_one():
    params = LLaDA2(CONFIG).init_params(jax.random.key(0))
    exact, rounded = (forward("xla", params, d)[1][0] for d in (jnp.float32, jnp.int8))
    error = np.abs(rounded - exact).max() / np.abs(exact).max()
    assert 0 < error < 0.02


def test_what_a_gpu_gets_needs_no_tpu_kernel():
    """Lowered for CUDA on this machine: no kernel of ours, and it lowers."""
    model = LLaDA2(CONFIG)
    params = jax.eval_shape(model.init_params, jax.random.key(0))

    def step(params, tokens):
        cache = init_cache(CONFIG, 2, 32, jnp.bfloat16)
        length = jnp.array([0, 8])
        out = model.apply({"params": params}, tokens, cache=cache, cache_length=length)
        nothing = jnp.full(tokens.shape, -1)
        zero = jnp.zeros(tokens.shape)
        return model.apply(
            {"params": params}, out.hidden, nothing, nothing, zero, method="confidence"
        )

    traced = jax.jit(step).trace(params, jax.ShapeDtypeStruct((2, BLOCK), jnp.int32))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "tpu_custom_call" not in text
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()
