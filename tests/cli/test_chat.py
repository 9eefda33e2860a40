import shutil

import pytest

from llada_jax.llm import model_folder

LONG = "9,10,11,12,13,14,15,16,17,18,19,20,"  # the canvas of all tests has two blocks
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The built-in model with a template that writes turn after turn."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(model_folder("counting"), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return str(folder)


def test_turns_follow_each_other(run, model):
    code, out, err = run(
        "chat", "--model", model, "--max-tokens", "6", "--system", "9,10,11,12,13,14,15,16,",
        stdin="17,18,19,20,\n\n23,24,25,\n/quit\nnever\n",
    )  # fmt: skip
    assert code == 0
    assert out.splitlines() == ["21,22,", "26,27,"]
    assert err.count("6 tokens") == 2


def test_commands(run, model):
    turns = (
        "/mode speed",
        "/set max_new_tokens=6 seed=1",
        LONG,
        "/set treshold=1",
        "/mode fast",
        "/dance",
        "/mode v20",
        "/reset",
        LONG,
    )
    code, out, err = run("chat", "--model", model, stdin="\n".join(turns))
    assert code == 0
    assert out.splitlines() == ["21,22,", "21,22,"]
    notes = err.splitlines()
    assert notes[0] == "threshold=0.5 editing_threshold=0.0"
    assert notes[1] == "max_tokens=6 threshold=0.5 editing_threshold=0.0 seed=1"
    assert notes[2].startswith("6 tokens")
    assert "did you mean 'threshold'" in notes[3]
    assert "mode = 'fast'" in notes[4]
    assert "'/dance' is no command" in notes[5]
    assert notes[6] == "max_tokens=6 threshold=0.95 editing_threshold=off steps=32 seed=1"
    assert notes[7] == "the conversation is empty"


def test_a_turn_that_does_not_fit_is_refused_and_forgotten(run, model):
    code, out, err = run(
        "chat", "--model", model, "--max-tokens", "6", stdin="1," * 1100 + f"\n{LONG}\n"
    )
    assert code == 0
    assert "context is 2048" in err.splitlines()[0]
    assert out.splitlines() == ["21,22,"]
