import pytest

from llada_jax.config import ConfigError
from llada_jax.data import DataConfig, SourceSpec


def test_unknown_fields_name_the_nearest():
    with pytest.raises(
        ConfigError, match=r"data has no field 'max_len'.*did you mean 'max_seq_len"
    ):
        DataConfig.from_mapping({"train_path": "a.jsonl", "max_len": 7})
    with pytest.raises(ConfigError, match=r"train_path has no field 'wieght'; did you mean 'weigh"):
        DataConfig(train_path=[{"path": "a.jsonl", "wieght": 2}])


def test_train_path_is_needed():
    with pytest.raises(ConfigError, match="train_path is missing"):
        DataConfig.from_mapping({"packing": False})


@pytest.mark.parametrize(
    ("length", "block", "near"),
    [(1000, 32, "use 992 or 1024"), (20, 32, "use 32$"), (33, 32, "use 32 or 64")],
)
def test_length_must_be_whole_blocks(length, block, near):
    with pytest.raises(
        ConfigError, match=f"max_seq_len = {length} .* block_length = {block}.*{near}"
    ):
        DataConfig(train_path="a", max_seq_len=length, block_length=block)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"on_bad_row": "ignore"}, "on_bad_row = 'ignore' must be one of error, skip"),
        ({"on_long": True}, "on_long = True must be a string"),
        ({"packing": 1}, "packing = 1 must be true or false"),
        ({"validation_fraction": 1.5}, "validation_fraction = 1.5 must be a number from 0 to 1"),
        ({"validation_fraction": 1.0}, "leaves nothing to train on"),
        ({"validation_fraction": 0.1, "validation_path": "b"}, "exclude each other"),
        ({"random_length": "often"}, "random_length = 'often'"),
        ({"max_seq_len": 12.0}, "max_seq_len = 12.0 must be an integer"),
        ({"shuffle_seed": -1}, "shuffle_seed = -1"),
        ({"text_keys": ["a"]}, "text_keys = .* must be a string"),
        ({"document_separator": ""}, "must not be empty"),
        ({"train_path": []}, "train_path is empty"),
        ({"train_path": 3}, "train_path = 3 must be a path"),
        ({"train_path": ["a", {"path": "b", "task": "c"}]}, r"train_path\[1\] needs either"),
        ({"train_path": [{"weight": 1}]}, "needs either path or task"),
        ({"train_path": [{"path": 3}]}, r"train_path.path = 3 must be a string"),
        ({"train_path": [{"path": "a", "weight": 0}]}, "weight = 0 must be a positive number"),
        ({"train_path": [{"path": "a", "difficulty": 1}]}, "difficulty is for tasks"),
        ({"train_path": [{"task": "a", "difficulty": "x"}]}, "difficulty = 'x' must be an int"),
        ({"train_path": [{"task": "a", "difficulty": []}]}, "difficulty = .* must be an int"),
        ({"train_path": [{"task": "a", "size": 0}]}, "size = 0 must be a positive"),
        ({"validation_path": {"pth": "a"}}, "validation_path has no field 'pth'"),
    ],
)
def test_bad_values(fields, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig.from_mapping({"train_path": "a.jsonl", **fields})


def test_sources():
    config = DataConfig(
        train_path=["a.jsonl", {"task": "addition", "difficulty": [1, 2], "weight": 2}],
        validation_path="b.jsonl",
    )
    assert config.sources("train") == (
        SourceSpec(path="a.jsonl"),
        SourceSpec(task="addition", difficulty=(1, 2), weight=2.0),
    )
    assert config.sources("validation") == (SourceSpec(path="b.jsonl"),)


def test_no_validation_data():
    with pytest.raises(ConfigError, match=r"no validation data; set data\.validation_path"):
        DataConfig(train_path="a").sources("validation")
