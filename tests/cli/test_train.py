import json

import pytest
import yaml

from llada_jax.training import RunConfig, loop
from tests.training.tiny import write_files


@pytest.fixture
def file(tmp_path):
    """A configuration for a run in ``tmp_path / "run"``."""
    raw = write_files(tmp_path)
    raw["train"]["output_dir"] = str(tmp_path / "run")
    raw["train"]["fsdp"] = 0
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return str(path)


def test_show_prints_what_loads_again(run, file, tmp_path):
    code, out, err = run("train", file, "--show", "train.lr=1e-2", "phases=[{until: 1}]")
    assert (code, err) == (0, "")
    shown = yaml.safe_load(out)
    assert shown["train"]["lr"] == 1e-2
    assert shown["data"]["block_length"] == 8, "what follows from other settings is shown too"
    (tmp_path / "shown.yaml").write_text(out)
    assert run("train", str(tmp_path / "shown.yaml"), "--show") == (0, out, "")
    assert RunConfig.from_mapping(shown).to_mapping() == shown
    assert not (tmp_path / "run").exists()


def test_shipped_configurations_are_shown(run):
    for name in ("nano", "sft", "cpt"):
        code, out, _ = run("train", name, "--show", "model.model_path=m", "data.train_path=d")
        assert (code, yaml.safe_load(out)["train"]["output_dir"]) == (0, f"runs/{name}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no training configuration 'nowhere'"),
        (["FILE", "train.lr"], "'train.lr' is not an override; write section.key=value"),
        (["FILE", "train.lrr=1"], "train has no field 'lrr'; did you mean 'lr'?"),
        (["FILE", "train=1"], "train = 1 must be a section"),
        (["FILE", "--shw"], "did you mean '--show'?"),
        (["FILE", "data.train_path=gone.jsonl"], "gone.jsonl"),
        (["FILE", "data.train_path=EMPTY"], "holds no documents"),
        (["FILE", "data.train_path=BAD"], "bad.jsonl, line 2"),
        (["FILE", "data.train_path=LONG"], "longer than max_seq_len = 32 tokens; raise"),
        (["FILE", "train.global_batch_size=6"], "6 rows at a time cannot be spread over 8"),
        (["FILE", "train.fsdp=3", "train.global_batch_size=6"], "needs 3 devices; there are 8"),
        (["FILE", "model.tokenizer_path=none"], "none"),
    ],
)
def test_what_is_wrong_is_one_line_and_leaves_nothing(run, file, tmp_path, arguments, message):
    names = {"FILE": file}
    for name, text in (
        ("empty", ""),
        ("bad", '{"text": "good"}\n{"text": 3}\n'),
        ("long", json.dumps({"prompt": "x" * 99, "response": "y"})),
    ):
        names[f"data.train_path={name.upper()}"] = f"data.train_path={tmp_path / name}.jsonl"
        (tmp_path / f"{name}.jsonl").write_text(text)
    code, out, err = run("train", *(names.get(a, a) for a in arguments))
    assert (code, out) == (2, "")
    assert err.startswith("llada-jax: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("exported", [True, False])
def test_outcome(run, file, tmp_path, monkeypatch, finished, exported):
    folder = tmp_path / "run"
    if exported:
        (folder / "hf").mkdir(parents=True)
    result = loop.RunResult(folder, 7, finished, {"loss": 0.5})
    monkeypatch.setattr("llada_jax.training.train", lambda config: result)
    code, out, err = run("train", file, "--json")
    assert (code, err) == (0 if finished else 143, "")
    said = {"folder": str(folder), "step": 7, "finished": finished, "metrics": {"loss": 0.5}}
    assert json.loads(out) == said
    _, out, _ = run("train", file)
    if not finished:
        assert out == "stopped after step 7; the same command goes on\n"
    elif exported:
        assert out == f"7 steps done; the model is in {folder / 'hf'}\n"
    else:
        assert out == "7 steps done; no model was exported\n"
