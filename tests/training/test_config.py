import dataclasses

import pytest
import yaml

from llada_jax.config import ConfigError, config_folder
from llada_jax.training import RunConfig, load_run_config
from llada_jax.training.config import apply_overrides

SHIPPED = sorted(file.stem for file in (config_folder() / "train").glob("*.yaml"))
NEEDED = ["model.model_path=somewhere", "data.train_path=[a.jsonl, b.jsonl]"]
LEAST = {
    "model": {"model_path": "m"},
    "data": {"train_path": "a.jsonl"},
    "train": {"output_dir": "o", "max_steps": 10},
}


def read(*overrides: str) -> RunConfig:
    return RunConfig.from_mapping(apply_overrides(LEAST, overrides))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_come_back_from_what_they_resolve_to(name):
    config = load_run_config(name, NEEDED)
    written = yaml.safe_dump(config.to_mapping(), sort_keys=False)
    assert RunConfig.from_mapping(yaml.safe_load(written)) == config


def test_shipped_files_are_found_by_name_and_by_path():
    assert {"nano", "sft", "cpt"} <= set(SHIPPED)
    path = config_folder() / "train" / "nano.yaml"
    assert load_run_config(path) == load_run_config("nano")
    with pytest.raises(ConfigError, match=r"no training configuration 'nanoo'.*nano"):
        load_run_config("nanoo")


def test_overrides_are_yaml():
    config = read(
        "train.lr=1e-5",  # YAML alone would read a string
        "train.max_steps=1e2",
        "data.train_path=[a.jsonl, {path: b.jsonl, weight: 2}]",
        "train.wandb_name=a b",
        "diffusion.mdlm=true",
        "train.micro_batch_size=null",
    )
    assert (config.train.lr, config.train.max_steps) == (1e-5, 100)
    assert [s.path for s in config.data.sources("train")] == ["a.jsonl", "b.jsonl"]
    assert (config.train.wandb_name, config.phases[0].diffusion.mdlm) == ("a b", True)


def test_overrides_reach_into_lists():
    raw = LEAST | {"phases": [{"until": 0.5}, {"until": 1, "rounds": 2}]}
    config = RunConfig.from_mapping(
        apply_overrides(raw, ["phases.0.until=0.25", "phases.1.block_size=16"])
    )
    assert [phase.until for phase in config.phases] == [0.25, 1]
    assert config.phases[1].diffusion.block_size == 16
    assert raw["phases"][0]["until"] == 0.5, "the mapping given must not change"
    again = RunConfig.from_mapping(apply_overrides(raw, ["phases.1={until: 1, rounds: 3}"]))
    assert again.phases[1].diffusion.rounds == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr", "is not an override"),
        ("=3", "is not an override"),
        ("train.lr=[1", "is not YAML"),
        ("train.max_steps.x=1", "train.max_steps holds a plain value"),
        ("train.max_steps.x.y=1", "no 'x' to set something in"),
        ("data.train_path.7=b", "train_path holds a plain value"),
        ("phases.0.until=1", "phases must be a list"),
        ("train=5", "train = 5 must be a section"),
        ("train={1: 2}", "train"),
        ("trian.lr=1", r"no field 'trian'.*'train'"),
        ("train.grad_norm=1", r"train has no field 'grad_norm'.*'max_grad_norm'"),
        ("train.lr_warmup=0.1", r"no field 'lr_warmup'.*'lr_warmup_ratio'"),
        ("diffusion.block_sise=1", r"diffusion has no field 'block_sise'.*'block_size'"),
        ("data.packed=true", r"data has no field 'packed'.*'packing'"),
        ("model.config=x", r"model has no field 'config'.*'config_path'"),
        ("train.lr=fast", "train.lr = 'fast' must be of type float"),
        ("train.max_steps=1.5", "train.max_steps = 1.5 must be of type int"),
        ("train.max_steps=true", "must be of type int"),
        ("train.remat=true", "must be of type str"),
        ("train.max_steps=0", "at least 1"),
        ("train.max_steps=null", "either train.max_steps or train.num_train_epochs"),
        ("train.num_train_epochs=1", "either train.max_steps or train.num_train_epochs"),
        ("train.micro_batch_size=3", "micro_batch_size = 3 does not divide .*batch_size = 8"),
        ("train.lr_decay_style=linear", "'cosine', 'wsd', 'constant'"),
        ("train.remat=some", "'none', 'dots', 'full'"),
        ("train.lr_min=1", "at most train.lr"),
        ("train.lr_warmup_ratio=2", "between 0 and 1"),
        ("train.max_grad_norm=-1", "at least 0"),
        ("train.expert_bias_update_rate=-1", "at least 0"),
        ("train.beta2=1", r"in \[0, 1\)"),
        ("train.tensor=0", "at least 1"),
        ("train.fsdp=-1", "at least 0"),
        ("train.output_dir=", "train.output_dir is missing"),
        ("train.same_token_labels=false", "same_token_labels must be True"),
        ("data.datasets_type=iterable", "must be 'mapping'"),
        ("data.train_path=null", "data.train_path is missing"),
        ("model.model_path=null", "give model.model_path .* or model.config_path"),
        ("model={config_path: nano}", "give model.tokenizer_path, or model.tokenizer_vocab_size"),
        ("phases=[]", "phases must be a list"),
        ("phases=[{rounds: 2}]", r"phases\[0\] .* needs until"),
        ("phases=[{until: 0.5}]", "last phase ends at 0.5; it must end at 1"),
        ("phases=[{until: 0.5}, {until: 0.5}]", r"phases\[1\].until = 0.5 must be in \(0.5, 1\]"),
        ("phases=[{until: 2}]", r"must be in \(0.0, 1\]"),
        ("phases=[{until: 1, round: 2}]", "did you mean 'rounds'"),
        ("phases=[{until: 1, rounds: 0}]", "rounds = 0 must be at least 1"),
    ],
)
def test_what_is_wrong_is_said(override, message):
    with pytest.raises(ConfigError, match=message):
        read(override)


def test_an_entry_that_a_list_lacks():
    raw = LEAST | {"phases": [{"until": 1}]}
    with pytest.raises(ConfigError, match="phases holds a list without that entry"):
        apply_overrides(raw, ["phases.3={until: 1}"])
    with pytest.raises(ConfigError, match="no '3' to set something in"):
        apply_overrides(raw, ["phases.3.until=1"])


def test_names_of_dfactory():
    raw = {
        "model": {"config_path": "nano", "tokenizer_path": "tok", "model_path": "m"},
        "data": {
            "train_path": "a.jsonl",
            "datasets_type": "mapping",
            "text_keys": "messages",
            "noise_range_low": 0.3,
            "noise_range_high": 0.8,
        },
        "train": {
            "output_dir": "o",
            "num_train_epochs": 1,
            "block_size": 16,
            "block_diffusion_mode": True,
            "same_token_labels": True,
            "confidence_beta": "2e0",
            "optimizer": "adamw",
            "lr_decay_style": "cosine",
            "enable_mixed_precision": True,
            "enable_gradient_checkpointing": True,
        },
    }
    config = RunConfig.from_mapping(raw)
    objective = config.phases[0].diffusion
    assert (objective.noise_range_low, objective.noise_range_high) == (0.3, 0.8)
    assert (objective.block_size, objective.confidence_beta) == (16, 2.0)
    assert config.train.remat == "full"
    assert config.data.block_length == 16
    raw["train"]["enable_gradient_checkpointing"] = False
    assert RunConfig.from_mapping(raw).train.remat == "none"
    raw["diffusion"] = {"block_size": 16}
    with pytest.raises(
        ConfigError, match=r"train.block_size and diffusion.block_size say the same"
    ):
        RunConfig.from_mapping(raw)


def test_phases_override_the_objective_and_the_last_aligns_documents():
    config = read(
        "diffusion={block_size: 32, z_loss: 1e-3}",
        "phases=[{until: 0.2, block_size: 4}, {until: 1, rounds: 2, block_size: 8}]",
    )
    first, last = (phase.diffusion for phase in config.phases)
    assert (first.block_size, first.rounds, first.z_loss) == (4, 1, 1e-3)
    assert (last.block_size, last.rounds, last.z_loss) == (8, 2, 1e-3)
    assert config.data.block_length == 8
    assert RunConfig.from_mapping(config.to_mapping()) == config


def test_accumulation():
    assert read("train.global_batch_size=12", "train.micro_batch_size=4").train.accumulation == 3
    assert read().train.accumulation == 1


def test_fields_are_documented():
    from llada_jax.training.config import ModelSection, TrainSection

    for section in (ModelSection, TrainSection):
        assert section.__doc__ is not None
        for field in dataclasses.fields(section):
            assert field.name in section.__doc__
