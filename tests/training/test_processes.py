"""Runs as users start them: processes that are killed, stopped, and several at a time."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from llada_jax.checkpoint.hf import load_hf
from llada_jax.training import read_metrics
from llada_jax.training.checkpoint import saved_steps
from tests.checkpoint.test_multiprocess import free_port
from tests.training.compare import assert_close, assert_identical, log_of, state_of
from tests.training.tiny import MOE, write_files

STEPS = 242


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts the same command for a run in a folder of that name, as a process of its own."""
    folder = tmp_path_factory.mktemp("processes")
    config = write_files(folder, MOE)
    config["diffusion"]["layout"] = "joint"  # compiles faster
    config["train"] |= {
        "output_dir": "none",
        "max_steps": STEPS,
        "save_steps": 30,
        "keep_checkpoints": 3,
        "eval_steps": 80,
        "keep_best": 2,
        "log_steps": 3,
        "save_hf_weights": True,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), *sys.path])),
        # One device. What one process compiles the next one reads, as it is for users.
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=1"),
        "LLADA_JAX_COMPILATION_CACHE": str(folder / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    children = []

    def begin(name: str, program=("-m", "llada_jax.cli"), overrides=()) -> subprocess.Popen:
        child = subprocess.Popen(
            [
                *(sys.executable, *program, "train", str(folder / "run.yaml"), "--json"),
                *(f"train.output_dir={folder / name}", *overrides),
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        children.append(child)
        return child

    begin.folder = folder
    yield begin
    for child in children:
        child.kill()
        child.communicate()


def end(child: subprocess.Popen, code: int = 0) -> dict:
    """Waits for a process; what it said as JSON (below what gloo says)."""
    out, err = child.communicate(timeout=900)
    assert child.returncode == code, err
    return json.loads(out.splitlines()[-1])


def wait_until(what, child: subprocess.Popen, seconds: float = 900) -> None:
    limit = time.monotonic() + seconds
    while not what():
        assert child.poll() is None, f"ended before it could be stopped: {child.communicate()}"
        assert time.monotonic() < limit
        time.sleep(0.005)


@pytest.fixture(scope="module")
def whole(start) -> Path:
    """The folder of a run that nothing interrupted."""
    said = end(start("whole"))
    folder = start.folder / "whole"
    assert (said["folder"], said["step"], said["finished"]) == (str(folder), STEPS, True)
    assert said["metrics"]["loss"] > 0
    return folder


def test_what_a_run_leaves(whole):
    names = sorted(path.name for path in whole.iterdir())
    assert names == ["best", "checkpoints", "config.yaml", "hf", "metrics.jsonl"]
    assert saved_steps(whole / "checkpoints") == [210, 240, STEPS]
    rows = read_metrics(whole)
    validated = [row["step"] for row in rows if row["split"] == "validation"]
    assert validated == [80, 160, 240, STEPS]
    losses = [row["loss"] for row in rows if row["split"] == "train"]
    assert losses[-1] < losses[0]


def test_the_export_is_the_last_state_and_chats(whole):
    from llada_jax import LLM, SamplingParams

    config, params = load_hf(whole / "hf")
    last = state_of(whole)
    assert params["embed"]["embedding"].tobytes() == last["params/embed/embedding"].tobytes()
    bias = params["moe_layers"]["moe"]["router"]["expert_bias"]
    assert abs(bias).max() > 0
    assert config.vocab_size == MOE["vocab_size"]
    llm = LLM(whole / "hf")
    message = [{"role": "user", "content": "a b"}]
    (answer,) = llm.chat(message, SamplingParams(max_tokens=8, block_length=8))
    assert answer.token_ids
    assert isinstance(answer.text, str)


def test_killed_and_terminated_runs_end_as_if_nothing_had_been(start, whole):
    """SIGKILL at a random moment after the first checkpoint, then SIGTERM, then to the end."""
    folder = start.folder / "parts"
    child = start("parts")
    wait_until(lambda: saved_steps(folder / "checkpoints"), child)
    delay = random.Random().uniform(0, 0.4)
    time.sleep(delay)
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL, f"over within {delay} s of the first checkpoint"
    killed_at = saved_steps(folder / "checkpoints")[-1]
    assert killed_at < STEPS, delay

    child = start("parts")
    for line in child.stderr:
        if line.startswith("step "):  # it goes on
            break
    child.terminate()
    said = end(child, code=143)
    assert not said["finished"]
    assert killed_at < said["step"] < STEPS
    assert saved_steps(folder / "checkpoints")[-1] == said["step"], "no step is lost"
    assert not (folder / "hf").exists()

    assert end(start("parts"))["step"] == STEPS
    assert_identical(state_of(whole), state_of(folder))
    assert log_of(whole) == log_of(folder)
    assert saved_steps(whole / "best") == saved_steps(folder / "best")
    assert [p.name for p in folder.rglob("*.partial") if p.parent.name == "checkpoints"] == []
    weights = "hf/model.safetensors"
    assert (whole / weights).read_bytes() == (folder / weights).read_bytes()


TWO = """
import sys
import jax

rank, port = int(sys.argv.pop(1)), sys.argv.pop(1)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, rank)
assert jax.device_count() == 2 and jax.local_device_count() == 1
from llada_jax.cli import main
from llada_jax.training import loop

loop.measured_peak_flops = lambda dtype: 1e9
sys.exit(main(sys.argv[1:]))
"""


def test_two_processes_go_on_where_one_stopped(start, whole):
    """MULTI-PROCESS: two over gloo, one device each; weights are gathered for the export."""
    folder = start.folder / "two"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns(f"step_{STEPS:08d}", "hf"))
    assert saved_steps(folder / "checkpoints") == [210, 240]
    port = free_port()
    children = [
        start("two", ["-c", TWO, str(rank), port], ["train.fsdp=2", "train.keep_best=9"])
        for rank in range(2)
    ]
    said = [end(child) for child in children]
    assert [s["step"] for s in said] == [STEPS, STEPS]
    assert said[0]["metrics"]["loss"] == said[1]["metrics"]["loss"]
    assert_close(state_of(whole), state_of(folder), 1e-4)
    for a, b in zip(log_of(whole), log_of(folder), strict=True):
        assert (a["step"], a["split"]) == (b["step"], b["split"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert saved_steps(folder / "best")[-1] == STEPS, "a model is exported from both"
    for mine, other in zip(*(sorted_weights(f / "hf") for f in (whole, folder)), strict=True):
        assert abs(mine - other).max() < 1e-4


def sorted_weights(folder: Path):
    import jax

    return jax.tree.leaves(load_hf(folder)[1])
