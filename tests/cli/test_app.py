import os
import subprocess
import sys
import time

import pytest

from llada_jax import cli
from llada_jax.cli import app

ERRORS = {
    "unknown command": (["generat"], "did you mean 'generate'"),
    "unknown option": (["--fast"], "unknown command '--fast'"),
    "unknown flag": (["generate", "x", "--treshold", "0.5"], "did you mean '--threshold'"),
    "unknown field": (["generate", "x", "--set", "treshold=0.5"], "did you mean 'threshold'"),
    "field without value": (["generate", "x", "--set", "threshold"], "field=value"),
    "field twice": (["generate", "x", "--seed", "1", "--set", "seed=2"], "seed is given twice"),
    "alias twice": (["generate", "x", "--max-tokens", "1", "--set", "gen_length=2"], "twice"),
    "two modes": (["generate", "x", "--mode", "v20", "--set", "mode=speed"], "contradict"),
    "unknown mode": (["generate", "x", "--mode", "fast"], "invalid choice: 'fast'"),
    "unknown mode by name": (["generate", "x", "--set", "decode=fast"], "quality, speed, v20"),
    "threshold range": (["generate", "x", "--threshold", "1.5"], "threshold = 1.5"),
    "threshold word": (["generate", "x", "--threshold", "high"], "threshold = 'high'"),
    "threshold off": (["generate", "x", "--threshold", "off"], "threshold = None"),
    "block length": (["generate", "x", "--block-length", "24"], "use 16 or 32"),
    "block length 0": (["generate", "x", "--block-length", "0"], "block_length = 0"),
    "max tokens": (["generate", "x", "--max-tokens", "0"], "max_tokens = 0"),
    "negative seed": (["generate", "x", "--seed", "-1"], "seed = -1"),
    "stop id": (["generate", "x", "--stop-token-ids", "1,x"], "stop_token_ids holds 'x'"),
    "empty prompt": (["generate", ""], "prompt 0 is empty"),
    "empty input": (["generate"], "prompt 0 is empty"),
    "context": (["generate", "1,", "--max-tokens", "4000"], "context is 2048"),
    "token id": (["generate", "--token-ids", "1,320"], "token id 320"),
    "token word": (["generate", "--token-ids", "1,b"], "1,b"),
    "mixed prompts": (["generate", "x", "--token-ids", "1"], "cannot be combined"),
    "no prompt file": (["generate", "--prompt-file", "nowhere.txt"], "nowhere.txt: No such file"),
    "no trace folder": (["generate", "x", "--trace", "nowhere/t.json"], "create it first"),
    "no model": (["generate", "x", "--model", "./nowhere"], "nowhere"),
    "dtype": (["generate", "x", "--dtype", "int3"], "invalid choice: 'int3'"),
    "no chat template": (["chat"], "has no chat template"),
    "info": (["info", "tiny"], "counting, flash, mini"),
    "info nothing": (["info"], "required: model"),
    "convert to": (["convert", "counting", "x", "--to", "gguf"], "invalid choice: 'gguf'"),
    "convert over": (["convert", "counting", ".", "--to", "hf"], "exists already"),
    "verify nothing": (["verify", "counting", "./nowhere"], "nowhere"),
    "verify seed": (["verify", "counting", "counting", "--seed", "-1"], "not be negative"),
    "bench what": (["bench", "speed"], "invalid choice: 'speed'"),
    "bench batch": (["bench", "decode", "--batch", "0"], "at least 1"),
    "bench context": (["bench", "decode", "--prompt-length", "4000"], "context of 2048"),
    "bench size": (["bench", "load", "--gigabytes", "-1"], "positive"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line_and_exit_code_2(run, case):
    arguments, fragment = ERRORS[case]
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("llada-jax: error: ")
    assert err.count("\n") == 1
    assert fragment in err


def test_control_characters_of_the_input_are_spelled_out(run):
    _, _, err = run("generate", "x", "--set", "\x1b[2J=1")
    assert "\x1b" not in err
    assert "\\x1b[2J" in err


def test_debug_shows_the_traceback(run, monkeypatch):
    monkeypatch.setenv("LLADA_JAX_DEBUG", "1")
    with pytest.raises(ValueError, match="unknown command"):
        run("generat")


def test_a_defect_is_not_hidden(run, monkeypatch):
    def broken(arguments):
        raise ValueError("not ours")

    monkeypatch.setattr(app, "_dispatch", broken)
    with pytest.raises(ValueError, match="not ours"):
        run("info", "mini")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 141, ""),
        (MemoryError(), 2, "out of memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating"), 2, "out of memory"),
        (RuntimeError("Unable to initialize backend 'tpu': x\ny"), 2, "JAX_PLATFORMS"),
        (PermissionError(13, "Permission denied", "t.json"), 2, "t.json: Permission denied"),
    ],
)
def test_what_happens_to_other_ends(run, monkeypatch, error, code, message):
    def fails(arguments):
        raise error

    monkeypatch.setattr(app, "_dispatch", fails)
    monkeypatch.setattr(app.os, "dup2", lambda *descriptors: None)
    got, out, err = run("info", "mini")
    assert (got, out) == (code, "")
    assert err.count("\n") == (1 if message else 0)
    assert message in err


def test_help_lists_every_command(run):
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    assert all(f"\n  {name} " in out for name in app.COMMANDS)
    assert run()[1] == out


@pytest.mark.parametrize("name", app.COMMANDS)
def test_every_command_has_help(run, name):
    code, out, err = run(name, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: llada-jax {name}")


def test_version(run):
    assert run("--version")[1].startswith("llada-jax 0.")


def test_main_is_what_the_console_script_calls():
    assert cli.main is app.main


def test_as_a_process_help_is_fast_and_needs_no_jax():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", "import sys; from llada_jax.cli import main; code = main();"
             " assert 'jax' not in sys.modules; sys.exit(code)", "--help"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        seconds.append(time.perf_counter() - start)
    assert "commands:" in done.stdout
    assert min(seconds) < 0.5


def test_a_reader_that_leaves_early_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-m", "llada_jax.cli", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141
