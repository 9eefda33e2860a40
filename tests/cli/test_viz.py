import json

from llada_jax.training.metrics import MetricsLog


def train(folder, steps=3):
    with MetricsLog(folder) as log:
        for step in range(1, steps + 1):
            log.write(step, {"loss": 1 / step, "grad_norm": 1.0})
    return str(folder)


def test_one_run_is_drawn_into_its_folder(run, tmp_path):
    folder = train(tmp_path / "sft")
    code, out, err = run("viz", folder)
    assert (code, err) == (0, "")
    assert out.splitlines() == [f"{folder}/curves.png", f"{folder}/curves.html"]


def test_several_runs_as_json(run, tmp_path, monkeypatch):
    folders = [train(tmp_path / name, steps) for name, steps in (("a", 3), ("b", 4))]
    monkeypatch.chdir(tmp_path)
    code, out, err = run("viz", *folders, "--format", "html", "--json")
    assert (code, err) == (0, "")
    printed = json.loads(out)
    assert printed["files"] == ["curves.html"]
    assert printed["runs"]["b"] == {
        "step": 4,
        "train": {"loss": 0.25, "grad_norm": 1.0},
        "validation": {},
    }
    assert (tmp_path / "curves.html").is_file()
    assert run("viz", *folders, "--out", "x", "--format", "png")[1] == "x/curves.png\n"


def test_errors(run, tmp_path):
    for arguments, message in (
        ([str(tmp_path)], "give the folder of a training run"),
        ([train(tmp_path / "empty", 0)], "nothing is logged yet"),
        ([str(tmp_path), "--format", "pdf"], "invalid choice: 'pdf'"),
    ):
        code, out, err = run("viz", *arguments)
        assert (code, out) == (2, "")
        assert message in err
