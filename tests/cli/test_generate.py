import json

import pytest

from llada_jax.cli.sampling_flags import parse_value
from llada_jax.viz import read_traces

PROMPT = "17,18,19,20,"
TEXT = ",".join(map(str, range(21, 48)))


def test_text_on_stdout_numbers_on_stderr(run):
    code, out, err = run("generate", PROMPT, "--mode", "speed", "--max-tokens", "80")
    assert code == 0
    assert out == TEXT + "\n"
    assert err.startswith("80 tokens, 9 forwards")


def test_three_ways_to_say_the_same(run):
    first = run("generate", PROMPT, "--mode", "speed", "--max-tokens", "80", "--json")
    assert run("generate", PROMPT, "--set", "decode=speed", "--set", "gen_length=80", "--json") == (
        first
    )
    flags = ("--threshold", "0.5", "--editing-threshold", "0", "--max-tokens", "80")
    assert run("generate", *flags, PROMPT, "--json") == first
    assert run("generate", PROMPT, "decode=speed", "gen_length=80", "--json") == first


def test_json_is_an_object_a_line(run, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text(f"{PROMPT}\n\n20,21,22,23,\n")
    code, out, err = run(
        "generate", "--prompt-file", str(file), "--json", "--mode", "speed", "--max-tokens", "80"
    )
    assert (code, err) == (0, "")
    first, second = map(json.loads, out.splitlines())
    assert set(first) == {
        "text",
        "token_ids",
        "num_tokens",
        "num_forwards",
        "num_commit_forwards",
        "num_edits",
        "tokens_per_forward",
        "finish_reason",
        "confidences",
    }
    assert (first["text"], first["num_forwards"], first["finish_reason"]) == (TEXT, 9, "length")
    assert first["tokens_per_forward"] == pytest.approx(80 / 9)
    assert len(first["confidences"]) == first["num_tokens"] == len(first["token_ids"]) == 80
    assert second["text"].startswith("24,25,26,")


def test_prompt_from_stdin_or_as_token_ids(run):
    options = ("--mode", "speed", "--max-tokens", "80")
    assert run("generate", *options, stdin=PROMPT + "\n")[1] == TEXT + "\n"
    ids = ",".join(str(16 + ord(c) - 32) for c in PROMPT)
    assert run("generate", *options, "--token-ids", ids)[1] == TEXT + "\n"


def test_editing_off_and_stop_strings(run):
    code, out, _ = run(
        "generate", PROMPT, "--threshold", "0.95", "--editing-threshold", "off",
        "--max-tokens", "80", "--stop", ",24", "--stop", "x",
    )  # fmt: skip
    assert (code, out) == (0, "21,22,23\n")


def test_watch_and_trace(run, tmp_path):
    file = tmp_path / "trace.json"
    code, out, err = run(
        "generate", PROMPT, "--watch", "--trace", str(file), "--json",
        "--set", "decode=speed", "--set", "max_tokens=80",
    )  # fmt: skip
    assert code == 0
    assert json.loads(out)["text"] == TEXT
    assert "   1  17,18,19,20,21,22,23,░░" in err
    (trace,) = read_traces(file)
    assert len(trace.steps) == 9
    recorded = json.loads(file.read_text())
    assert recorded["traces"][0]["text"] == TEXT
    assert recorded["token_texts"]["28"] == ","


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("editing_threshold", "off", None),
        ("seed", "None", None),
        ("ban_mask", "false", False),
        ("max_tokens", " 80", 80),
        ("threshold", ".5", 0.5),
        ("threshold", "abc", "abc"),
        ("stop_token_ids", "1, 2", (1, 2)),
        ("stop_token_ids", "[3]", (3,)),
        ("stop_token_ids", "", ()),
    ],
)
def test_values(name, text, value):
    assert parse_value(name, text) == value
