"""The command on a model that can chat, but has not learnt the tasks."""

import json
import shutil

import pytest

from llada_jax.cli import eval as command
from llada_jax.eval import TaskResult

KEYS = {
    "task",
    "difficulty",
    "n",
    "accuracy",
    "stderr",
    "tokens_per_forward",
    "tokens_per_second",
    "edits_per_token",
}


@pytest.fixture(scope="module")
def folder(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(golden, folder)
    (folder / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    return str(folder)


@pytest.fixture
def asked(monkeypatch):
    """What the command asks ``evaluate`` for; nothing is decoded."""
    calls = []

    def evaluate(llm, task, n, params, *, seed, report):
        calls.append((task, n, params, seed))
        scores = tuple([1.0, 0.0] * (n // 2))
        return TaskResult(task.name, task.difficulty, scores, 90, 30, 9, n, 0.5, "a device")

    monkeypatch.setattr(command, "evaluate", evaluate)
    return calls


def test_one_task(run, folder):
    code, out, err = run(
        "eval", "--model", folder, "--task", "addition", "--difficulty", "1", "--n", "2",
        "--mode", "speed", "--max-tokens", "24", "--json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert set(found) >= KEYS
    assert (found["task"], found["difficulty"], found["n"]) == ("addition", 1, 2)
    assert 0 < found["num_tokens"] <= 48
    assert found["tokens_per_second"] > 0


def test_all_tasks_and_their_mean(run, folder, asked):
    code, out, _ = run("eval", "--model", folder, "--n", "4", "--json")
    assert code == 0
    found = [json.loads(line) for line in out.splitlines()]
    assert [one["task"] for one in found] == [
        "addition", "arithmetic", "sudoku", "countdown", "editing", "mean",
    ]  # fmt: skip
    assert found[-1]["n"] == 20
    assert found[-1]["tokens_per_forward"] == 3
    assert {params.max_tokens for _, _, params, _ in asked} == {128}


def test_overrides_reach_the_decoder(run, folder, asked):
    code, out, _ = run(
        "eval", "--model", folder, "--task", "sudoku", "--task", "editing", "--mode", "v20",
        "--threshold", "0.9", "--set", "gen_length=64", "--seed", "7", "--n", "8",
        "--difficulty", "4",
    )  # fmt: skip
    assert code == 0
    assert "50.0 ± 18.9 %" in out
    settings = "a device: max_tokens=64 threshold=0.9 editing_threshold=off steps=32 seed=7"
    assert settings in " ".join(out.split())  # the title may take two lines
    assert "mean" in out
    assert [task.name for task, _, _, _ in asked] == ["sudoku", "editing"]
    task, n, params, seed = asked[0]
    assert (task.difficulty, n, seed) == (4, 8, 7)
    assert (params.threshold, params.editing_threshold, params.max_tokens) == (0.9, None, 64)
    run("eval", "--model", folder, "--task", "sudoku", "--multi-block-window", "3", "--n", "2")
    assert asked[-1][2].multi_block_window == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "additon"), "there is no task 'additon', did you mean 'addition'?"),
        (("--task", "x"), "known are addition,"),
        (("--batch-size", "3"), "must be a power of two"),
        (("--n", "0"), "must be at least 1"),
        (("--difficulty", "6"), "invalid choice"),
        (("--task", "sudoku", "--n", "1"), "has no chat template"),
    ],
)
def test_errors(run, arguments, message):
    code, out, err = run("eval", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
