import io
import json
import os
import re
import signal
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from llada_jax.training import progress as progress_module
from llada_jax.training.metrics import METRICS_FILE, MetricsLog, read_metrics
from llada_jax.training.progress import TrainingProgress, numbers
from llada_jax.training.trackers import MetricsError


def test_a_line_is_there_at_once_and_in_order(tmp_path):
    with MetricsLog(tmp_path / "run") as log:
        log.write(1, {"loss": jnp.float32(0.1), "m2t": jnp.bfloat16(0.5), "tokens": np.int64(7)})
        text = (tmp_path / "run" / METRICS_FILE).read_text()
        assert text == '{"step": 1, "split": "train", "loss": 0.1, "m2t": 0.5, "tokens": 7}\n'
        log.write(1, {"loss": jnp.ones((1, 1))}, split="validation")
    assert read_metrics(tmp_path / "run") == [
        {"step": 1, "split": "train", "loss": 0.1, "m2t": 0.5, "tokens": 7},
        {"step": 1, "split": "validation", "loss": 1.0},
    ]


def test_not_finite_values_are_null_and_counted(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(1, {"loss": float("nan"), "m2t": jnp.inf, "t2t": 2.0})
        log.write(2, {"loss": -np.inf})
        assert log.non_finite == 3
    for line in (tmp_path / METRICS_FILE).read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    assert [row["loss"] for row in read_metrics(tmp_path)] == [None, None]


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"loss": np.ones(2)}, "'loss' must be one number, not float64 of shape"),
        ({"loss": "low"}, "'loss' must be one number"),
        ({"step": 1.0}, "cannot be called 'step'"),
    ],
)
def test_what_is_no_number_is_refused(tmp_path, metrics, message):
    with MetricsLog(tmp_path) as log, pytest.raises(MetricsError, match=message):
        log.write(1, metrics)
    assert read_metrics(tmp_path) == []


def fill(folder, steps, resume_step=None):
    with MetricsLog(folder, resume_step=resume_step) as log:
        for step in steps:
            log.write(step, {"loss": 1 / step})
            if step % 2 == 0:
                log.write(step, {"loss": 2 / step}, split="validation")


def test_a_resumed_log_is_that_of_an_uninterrupted_run(tmp_path):
    fill(tmp_path / "whole", range(1, 11))
    fill(tmp_path / "broken", range(1, 8))
    with (tmp_path / "broken" / METRICS_FILE).open("a") as file:
        file.write('{"step": 8, "spl')
    assert len(read_metrics(tmp_path / "broken")) == 7 + 3
    fill(tmp_path / "broken", range(5, 11), resume_step=4)
    files = [(tmp_path / name / METRICS_FILE).read_bytes() for name in ("whole", "broken")]
    assert files[0] == files[1]
    assert os.listdir(tmp_path / "broken") == [METRICS_FILE]


def test_a_last_line_without_its_end_counts(tmp_path):
    (tmp_path / METRICS_FILE).write_text('{"step": 1, "loss": 2.0}')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]
    fill(tmp_path, [2], resume_step=1)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 2]


@pytest.mark.parametrize(("resume_step", "left"), [(-1, []), (0, []), (3, [1, 2, 2, 3]), (9, None)])
def test_how_much_is_cut(tmp_path, resume_step, left):
    fill(tmp_path, range(1, 7))
    before = (tmp_path / METRICS_FILE).read_bytes()
    MetricsLog(tmp_path, resume_step=resume_step).close()
    if left is None:
        assert (tmp_path / METRICS_FILE).read_bytes() == before
    else:
        assert [row["step"] for row in read_metrics(tmp_path)] == left


def test_resuming_without_a_log_begins_one(tmp_path):
    fill(tmp_path / "new", [3], resume_step=2)
    assert [row["step"] for row in read_metrics(tmp_path / "new")] == [3]


def test_a_new_run_does_not_mix_with_an_old_one(tmp_path):
    fill(tmp_path, [1])
    with pytest.raises(MetricsError, match="resume that run, or choose another folder"):
        MetricsLog(tmp_path)


def test_damage_in_the_middle_is_reported(tmp_path):
    file = tmp_path / METRICS_FILE
    file.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(MetricsError, match="line 2 is damaged"):
        read_metrics(tmp_path)
    file.write_text('{"step": 1}\n[2]\n')
    with pytest.raises(MetricsError, match="line 2 is no object with a step"):
        read_metrics(tmp_path)
    with pytest.raises(MetricsError, match="give the folder of a training run"):
        read_metrics(tmp_path / "nowhere")


def test_a_closed_log_says_so(tmp_path):
    log = MetricsLog(tmp_path)
    log.close()
    log.close()
    with pytest.raises(MetricsError, match="closed"):
        log.write(1, {"loss": 1.0})


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    with MetricsLog(tmp_path / "run", tensorboard=True) as log:
        log.write(1, {"loss": float("nan")})
        assert log.non_finite == 1
    assert not (tmp_path / "run").exists()


def test_lines_survive_sigkill(tmp_path):
    code = (
        "import os, signal, sys\n"
        "from llada_jax.training.metrics import MetricsLog\n"
        "log = MetricsLog(sys.argv[1])\n"
        "for step in range(1, 4): log.write(step, {'loss': 1.0})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    assert done.returncode == -signal.SIGKILL
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_tensorboard(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    for resume_step, step in ((None, 1), (1, 2)):
        with MetricsLog(tmp_path, tensorboard=True, resume_step=resume_step) as log:
            log.write(step, {"loss": 0.5, "m2t": float("nan")})
            log.write(step, {"loss": 0.25}, split="validation")
    values = {}
    for file in (tmp_path / "tensorboard").iterdir():
        data = file.read_bytes()
        while data:  # length, its checksum, the event, its checksum
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            data = data[12 + length + 4 :]
            for value in event.summary.value:
                values[value.tag, event.step] = value.simple_value
    assert values == {
        (f"{split}/loss", step): loss
        for step in (1, 2)
        for split, loss in (("train", 0.5), ("validation", 0.25))
    }


@pytest.mark.parametrize(
    ("package", "option"),
    [("wandb", {"wandb_project": "p"}), ("tensorboardX", {"tensorboard": True})],
)
def test_a_tracker_that_is_not_installed(tmp_path, monkeypatch, package, option):
    monkeypatch.setitem(sys.modules, package, None)
    message = rf'{package}, which is not installed.*pip install "llada-jax\[tracking\]"'
    with pytest.raises(MetricsError, match=message):
        MetricsLog(tmp_path, **option)


class FakeWandb(types.ModuleType):
    """Records what it is told."""

    def __init__(self):
        super().__init__("wandb")
        self.inits, self.logged, self.finished = [], [], 0

    def init(self, **arguments):
        self.inits.append(arguments)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for resume_step, name in ((None, None), (1, "other")):
        with MetricsLog(
            tmp_path / "run", wandb_project="p", run_name=name, resume_step=resume_step
        ) as log:
            log.write(2, {"loss": 1.0, "m2t": float("inf")}, split="validation")
    first, second = wandb.inits
    assert (first["project"], first["name"], second["name"]) == ("p", "run", "other")
    assert first["id"] == second["id"]
    assert first["resume"] == "allow"
    assert wandb.logged == [(2, {"validation/loss": 1.0})] * 2
    assert wandb.finished == 2
    with MetricsLog(tmp_path / "run", wandb_project="p", resume_step=-1):
        assert wandb.inits[2]["id"] != first["id"]


METRICS = {
    "loss": 3.2,
    "m2t": 3.3,
    "t2t": float("nan"),
    "keep": 0.42,
    "tokens_per_second": 12345.6,
    "mfu": 0.3125,
}


def test_numbers():
    expected = ["loss 3.2000", "m2t 3.3000", "keep 0.4200", "12.3k tokens/s", "MFU 31.2%"]
    assert numbers(METRICS) == expected
    assert numbers({"loss": np.float32("nan")}) == ["loss nan"]
    assert numbers({"tokens_per_second": 2.5e6}) == ["2.5M tokens/s"]


def test_plain_lines(capsys, monkeypatch):
    clock = iter([0.0, 60.0, 61.0, 62.0, 63.0, 64.0])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    with TrainingProgress(7, 2, True, 2) as progress:
        for step in range(3, 8):
            progress.update(step, METRICS)
    out, err = capsys.readouterr()
    assert out == ""
    numbers = "loss 3.2000  m2t 3.3000  keep 0.4200  12.3k tokens/s  MFU 31.2%"
    assert err.splitlines() == [
        f"step 4/7  {numbers}  0:00:03 left",  # a step a second, without the first one's minute
        f"step 6/7  {numbers}  0:00:01 left",
        f"step 7/7  {numbers}  0:00:00 left",
    ]


def test_disabled_or_left_it_shows_nothing(capsys):
    with TrainingProgress(3, 0, False, 1) as progress:
        progress.update(1, METRICS)
    with TrainingProgress(3, 0, True, 1) as progress:
        pass
    progress.update(2, METRICS)
    assert capsys.readouterr() == ("", "")


def test_the_bar(monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=60, color_system=None)
    monkeypatch.setattr(progress_module, "Console", lambda stderr: console)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with TrainingProgress(20, 10, True, 5) as progress:
        for step in range(11, 16):
            progress.update(step, METRICS)
    text = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", screen.getvalue())
    bar, below = [line for line in text.splitlines() if line.strip()][-2:]
    assert "15/20" in bar
    assert "left" in bar
    assert below == "loss 3.2000  m2t 3.3000  keep 0.4200  12.3k tokens/s  MFU 3…"
    assert len(bar) <= 60
