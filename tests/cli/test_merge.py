import json
import shutil

import pytest

from llada_jax.llm import model_folder
from tests.checkpoint.synthetic import make_config, make_tensors, read, same_bytes, write


@pytest.fixture
def training_run(tmp_path):
    """A run with three validated checkpoints."""
    config = make_config()
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
        folder = tmp_path / "run" / "best" / f"step_{step:06d}"
        write(folder, config, make_tensors(config, seed=step))
        (folder / "validation.json").write_text(json.dumps({"step": step, "loss": loss}))
    return tmp_path / "run"


def test_best_is_the_mean_of_the_best(run, training_run, tmp_path):
    best, given = str(tmp_path / "best"), str(tmp_path / "given")
    names = [str(training_run / "best" / f"step_00000{step}") for step in (2, 3)]
    code, out, err = run("merge", "--best", "2", str(training_run), best, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"out": best, "merged": names, "weights": None}
    code, out, err = run("merge", given, *names, "--weights", "2", "2")
    assert (code, out) == (0, "")
    assert f"wrote {given}, the mean of {names[0]}, {names[1]}" in err
    same_bytes(read(tmp_path / "best"), read(tmp_path / "given"))


def test_a_built_in_model_merges_with_itself(run, tmp_path):
    assert run("merge", str(tmp_path / "out"), "counting", "counting")[0] == 0
    same_bytes(read(tmp_path / "out"), read(model_folder("counting")))
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_errors(run, training_run, tmp_path):
    folder = str(training_run / "best" / "step_000001")
    new, other = str(tmp_path / "new"), str(tmp_path / "other")
    shutil.copytree(folder, other)
    raw = json.loads((tmp_path / "other" / "config.json").read_text()) | {"rope_theta": 7.0}
    (tmp_path / "other" / "config.json").write_text(json.dumps(raw))
    for arguments, message in (
        ([new], "required: FOLDER"),
        ([new, folder, other], "rope_theta is 600000.0"),
        ([new, folder, "--weights", "1", "2"], "2 weights for 1 checkpoints"),
        ([new, folder, "--weights", "-1"], "must be positive"),
        ([folder, folder], "exists already"),
        (["--best", "2", new, str(training_run)], "the run comes first"),
        (["--best", "9", str(training_run), new], "holds 3 checkpoints"),
        (["--best", "1", str(training_run), new, new], "merge --best K RUN OUT"),
    ):
        code, out, err = run("merge", *arguments)
        assert (code, out) == (2, "")
        assert message in err
    assert not (tmp_path / "new").exists()
