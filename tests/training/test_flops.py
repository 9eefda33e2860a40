import pytest

from llada_jax.config import ModelConfig
from llada_jax.diffusion import DiffusionConfig
from llada_jax.training.flops import flops_per_clean_token, measured_peak_flops
from tests.training.tiny import DENSE, MOE

CONFIG = ModelConfig.from_hf(DENSE)
LENGTH = 64.0


def of(config=CONFIG, supervised=1.0, **fields) -> float:
    return flops_per_clean_token(
        config, DiffusionConfig(block_size=8, **fields), LENGTH, supervised
    )


def test_hand_count_of_a_dense_model():
    d, heads, kv, h, ffn, vocab, layers = 32, 2, 1, 8, 32, 261, 2
    projections = d * heads * h + 2 * d * kv * h + heads * h * d
    norms = 2 * d + 2 * h
    weights = layers * (projections + 3 * d * ffn + norms) + d
    # multiply and add; the clean and the noisy token
    linear = 2 * 2 * weights
    head = 2 * d * vocab  # of the noisy token
    # scores and mix, multiply and add; keys: half the row clean, that and its block noisy
    attention = layers * heads * h * 4 * (LENGTH / 2 + LENGTH / 2 + 8)
    assert of() == pytest.approx(3 * (linear + head + attention))


def test_what_it_grows_with():
    assert of(rounds=2) - of() == pytest.approx(of(rounds=3) - of(rounds=2))
    assert of() < of(rounds=2) == of(complementary=True) < 2 * of()
    assert of(mdlm=True) < of()
    assert of(supervised=0.5) < of()
    assert of(ModelConfig.from_hf(MOE)) == of(ModelConfig.from_hf(MOE | {"num_experts": 8})) - (
        3 * 2 * 2 * 2 * 32 * 4  # four more columns of two routers, for two tokens
    )


def test_peak_is_plausible():
    assert 1e6 < measured_peak_flops(size=64) < 1e16
