"""What a configuration refuses, and the names in its errors."""

import pytest

from llada_jax.config import ConfigError
from llada_jax.diffusion import DiffusionConfig

BAD = {
    "block_size": [0, -1],
    "noise_range_low": [-0.1, 1.1, float("nan")],
    "noise_range_high": [-0.1, 1.1, float("nan")],
    "noise_level": ["token", ""],
    "loss_weight": ["1/t"],
    "mask_loss": [-1.0, float("nan")],
    "edit_loss": [-1.0],
    "keep_loss": [-0.1],
    "random_edit_rate": [-0.1, 1.1],
    "rounds": [0],
    "draft_threshold_low": [-0.1, 1.1],
    "draft_threshold_high": [-0.1, 1.1],
    "draft_edit_rate": [-0.1, 1.1],
    "confidence_beta": [-1.0],
    "confidence_temperature": [0.0, -1.0],
    "cart_p": [-0.1, 1.1],
    "mask_noise_steps": [-1],
    "z_loss": [-1.0],
    "layout": ["both"],
    "loss_chunk": [0],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in BAD.items() for v in vs])
def test_out_of_range(name, value):
    with pytest.raises(ConfigError, match=rf"diffusion\.{name}\b"):
        DiffusionConfig(**{name: value})
    with pytest.raises(ConfigError, match=rf"diffusion\.{name}\b"):
        DiffusionConfig.from_mapping({name: value})


@pytest.mark.parametrize("name", ["noise_range", "draft_threshold"])
def test_ends_of_a_range_in_order(name):
    with pytest.raises(ConfigError, match=f"{name}_high"):
        DiffusionConfig(**{f"{name}_low": 0.6, f"{name}_high": 0.5})
    DiffusionConfig(**{f"{name}_low": 0.6, f"{name}_high": 0.6})


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("blok_size", "block_size"),
        ("keep_los", "keep_loss"),
        ("noise_range_hi", "noise_range_high"),
    ],
)
def test_unknown_field_names_the_nearest(wrong, near):
    with pytest.raises(ConfigError, match=f"'{wrong}'.*'{near}'"):
        DiffusionConfig.from_mapping({wrong: 1})


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("block_size", 4.5, "int"),
        ("block_size", True, "int"),
        ("block_size", None, "int"),
        ("keep_loss", "much", "float"),
        ("keep_loss", False, "float"),
        ("mdlm", 1, "bool"),
        ("mdlm", "yes", "bool"),
        ("layout", 3, "str"),
    ],
)
def test_wrong_type(name, value, kind):
    with pytest.raises(ConfigError, match=rf"diffusion\.{name} = .* type {kind}"):
        DiffusionConfig.from_mapping({name: value})


def test_numbers_as_yaml_writes_them():
    config = DiffusionConfig.from_mapping({"z_loss": "1e-5", "block_size": 8.0, "keep_loss": 1})
    assert config.z_loss == 1e-5
    assert (config.block_size, type(config.block_size)) == (8, int)
    assert type(config.keep_loss) is float
    assert DiffusionConfig.from_mapping({}) == DiffusionConfig()


def test_copies():
    assert DiffusionConfig().copies == 1
    assert DiffusionConfig(complementary=True).copies == 2
