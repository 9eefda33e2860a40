"""Reading configurations: released ones, variants, and what must be refused."""

import json

import pytest

from llada_jax.config import ConfigError, ModelConfig, RopeScaling
from llada_jax.model import LLaDA2, count_parameters, flatten_specs, weight_specs


@pytest.fixture
def raw(golden):
    return json.loads((golden.parent / "llada2.1-mini" / "config.json").read_text())


def test_parameter_counts():
    """The reports' totals, from shapes alone."""
    mini, flash = (count_parameters(ModelConfig.from_name(name)) for name in ("mini", "flash"))
    assert (mini.total, mini.active) == (16_255_638_528, 1_432_968_192)
    assert (mini.active_without_embedding, mini.expert_bias) == (789_142_528, 4_864)
    assert (flash.total, flash.active) == (102_889_697_280, 6_152_269_824)
    assert (flash.active_without_embedding, flash.expert_bias) == (4_864_618_496, 7_936)


def test_short_names_agree_with_released_files(raw, golden):
    assert ModelConfig.from_hf(raw) == ModelConfig.from_name("mini")
    assert ModelConfig.from_name(golden) == ModelConfig.from_name("counting")


@pytest.mark.parametrize("name", ["counting", "mini", "flash"])
def test_hf_round_trip(name):
    config = ModelConfig.from_name(name)
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_flash_has_no_array_until_asked():
    """Shapes of all 103 B parameters without allocating one."""
    import jax

    model = LLaDA2(ModelConfig.from_name("flash"))
    shapes = jax.eval_shape(model.init_params, jax.random.key(0))
    flat = flatten_specs(weight_specs(model.config))
    leaves = {
        "/".join(key.key for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }
    assert leaves == {path: spec.shape for path, spec in flat.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type = 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'; only 'silu' is supported"),
        ({"score_function": "softmax"}, "score_function = 'softmax'"),
        ({"norm_topk_prob": False}, "norm_topk_prob = False"),
        ({"use_qk_norm": False}, "use_qk_norm = False"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"expert_capacity": 48}, "expert_capacity = 48"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_scaling of type 'dynamic'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "mscale": 1}}, "rope_scaling.mscale = 1"),
        ({"rope_scaling": {"rope_type": "linear"}}, "needs a factor"),
        ({"rotary_dim": 32}, "rotary_dim = 32 contradicts partial_rotary_factor = 0.5"),
        ({"num_experts_per_tok": 300}, "num_experts_per_tok = 300"),
        ({"n_group": 7}, "num_experts = 256 must be a multiple of n_group = 7"),
        ({"num_key_value_heads": 3}, "num_attention_heads = 16 must be a multiple"),
        ({"mask_token_id": 200_000}, "mask_token_id = 200000 is outside the vocabulary"),
        ({"vocab_size": None}, "lacks vocab_size"),
        ({"hidden_size": "2048"}, "hidden_size = '2048' must be of type int"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings = 1 must be of type bool"),
        ({"rope_theta": "6e5"}, "rope_theta = '6e5' must be of type float"),
    ],
)
def test_refused(raw, change, message):
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_hf(raw | change)
    assert message in str(error.value)


def test_variants(raw):
    dense = ModelConfig.from_hf(raw | {"num_experts": None, "num_shared_experts": None})
    assert (dense.num_dense_layers, dense.num_moe_layers) == (20, 0)
    all_moe = ModelConfig.from_hf(raw | {"first_k_dense_replace": 0})
    assert (all_moe.num_dense_layers, all_moe.num_moe_layers) == (0, 20)
    eos = ModelConfig.from_hf(raw | {"eos_token_id": [156892, 156900]})
    assert eos.eos_token_ids == (156892, 156900)
    scaled = ModelConfig.from_hf(raw | {"rope_scaling": {"type": "linear", "factor": 2}})
    assert scaled.rope_scaling == RopeScaling("linear", 2.0)
    assert ModelConfig.from_hf(raw | {"model_type": "llada2_moe_veomni"}) == ModelConfig.from_hf(
        raw
    )


def test_unknown_name():
    with pytest.raises(ConfigError, match="one of ablation, counting, flash, mini, nano"):
        ModelConfig.from_name("nano-giant")
