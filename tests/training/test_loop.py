"""Whole runs within this process: on one device unless a test says otherwise."""

import json
import random
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
import yaml

from llada_jax.config import ConfigError
from llada_jax.data import DataError
from llada_jax.training import TrainingError, loop, read_metrics, setup
from llada_jax.training.checkpoint import ResumeError, saved_steps
from tests.training.compare import assert_close, assert_identical, log_of, state_of

LONG = "".join(random.Random(0).choices("qwertyuiopasdfghjkl", k=400))
PHASES = "phases=[{until: 0.5, mdlm: true}, {until: 1.0}]"


@pytest.fixture(scope="session")
def _whole():
    return {}


@pytest.fixture
def whole(_whole, configure, train, tmp_path_factory):
    """The folder of a run of 12 steps in two phases that nothing interrupted."""
    if "folder" not in _whole:
        run = configure(PHASES, f"train.output_dir={tmp_path_factory.mktemp('whole') / 'run'}")
        result = train(run)
        assert (result.step, result.finished) == (12, True)
        assert {"loss", "m2t_loss", "keep_loss"} <= result.metrics.keys()
        _whole["folder"] = result.folder
    return _whole["folder"]


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of that run as it was after a step that it saved, to go on from."""

    def make(step: int, name: str = "run") -> Path:
        shutil.copytree(whole, tmp_path / name)
        for later in saved_steps(whole / "checkpoints"):
            if later > step:
                shutil.rmtree(tmp_path / name / "checkpoints" / f"step_{later:08d}")
        return tmp_path / name

    return make


def test_what_a_run_leaves(whole):
    assert sorted(p.name for p in whole.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
    ]
    assert saved_steps(whole / "checkpoints") == [3, 6, 9, 12]
    rows = read_metrics(whole)
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12]
    assert all(row["split"] == "train" for row in rows)
    assert {"tokens_per_second", "mfu"} <= rows[-1].keys()
    assert rows[0]["learning_rate"] == pytest.approx(3e-3 / 2), "two steps of warm-up"
    assert rows[-1]["learning_rate"] < rows[2]["learning_rate"]


def test_stopped_and_resumed_is_bit_identical(whole, configure, train):
    """Between two lines of the log, and before and after the change of phase."""
    run = configure(PHASES)
    for stop in (5, 7):
        result = train(run, until=stop)
        assert (result.step, result.finished) == (stop, False)
    result = train(run)
    assert (result.step, result.finished) == (12, True)
    assert_identical(state_of(whole), state_of(run))
    assert log_of(whole) == log_of(run.train.output_dir)


def test_one_compilation_a_phase(configure, train, monkeypatch):
    steps = {}
    make = loop.make_step

    def spy(model, diffusion, *others):
        return steps.setdefault(diffusion, make(model, diffusion, *others))

    monkeypatch.setattr(loop, "make_step", spy)
    run = configure(PHASES)
    train(run)
    assert list(steps) == [phase.diffusion for phase in run.phases]
    assert [step._cache_size() for step in steps.values()] == [1, 1]


def test_a_finished_run_has_nothing_to_do(copy, configure, train):
    folder = copy(12)
    train(configure(PHASES))  # the copy's config.yaml names another folder
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    result = train(configure(PHASES))
    assert (result.step, result.finished) == (12, True)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_other_devices_go_on_where_one_stopped(copy, whole, configure, train):
    folder = copy(9)
    result = train(configure(PHASES, "train.fsdp=4", "train.data=2"))
    assert result.finished
    assert_close(state_of(whole), state_of(folder), 1e-4)
    for a, b in zip(log_of(whole), log_of(folder), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_validation_does_not_disturb(whole, configure, train):
    run = configure(PHASES, "train.eval_steps=3", "train.keep_best=2")
    result = train(run)
    assert_identical(state_of(whole), state_of(run))
    rows = log_of(result.folder)
    assert [row for row in rows if row["split"] == "train"] == log_of(whole)
    losses = {row["step"]: row["loss"] for row in rows if row["split"] == "validation"}
    assert list(losses) == [3, 6, 9, 12]
    best = sorted(sorted(losses, key=lambda step: losses[step])[:2])
    assert saved_steps(result.folder / "best") == best
    for step in best:
        folder = result.folder / "best" / f"step_{step:08d}"
        said = json.loads((folder / "validation.json").read_text())
        assert said == {"step": step, "loss": pytest.approx(losses[step], rel=1e-6)}
        assert {"config.json", "model.safetensors", "tokenizer_config.json"} <= {
            p.name for p in folder.iterdir()
        }


def test_validation_is_the_same_every_time(configure, train):
    """So its losses can be compared; nothing is kept where nothing is to be."""
    run = configure(PHASES, "train.eval_steps=4", "train.keep_best=0")
    train(run, until=5)
    first = log_of(run.train.output_dir)
    shutil.rmtree(Path(run.train.output_dir) / "checkpoints")
    train(run, until=5)
    assert log_of(run.train.output_dir) == first
    assert not (Path(run.train.output_dir) / "best").exists()


def test_only_the_newest_checkpoints_stay(configure, train):
    run = configure(PHASES, "train.keep_checkpoints=2")
    train(run, until=8)
    assert saved_steps(Path(run.train.output_dir) / "checkpoints") == [6, 8]
    train(run)
    assert saved_steps(Path(run.train.output_dir) / "checkpoints") == [9, 12]


def test_half_written_checkpoints_are_ignored_and_cleared(copy, whole, configure, train):
    folder = copy(9)
    partial = folder / "checkpoints" / ".step_00000012.4711.partial"
    shutil.copytree(folder / "checkpoints" / "step_00000009", partial)
    (partial / "run.json").unlink()
    train(configure(PHASES))
    assert_identical(state_of(whole), state_of(folder))
    assert not partial.exists()


def test_a_damaged_checkpoint_is_named(copy, whole, configure, train):
    for number, damage in enumerate((_truncate, _lose_arrays, _lose_position)):
        folder = copy(9, f"run{number}")
        newest = folder / "checkpoints" / "step_00000009"
        damage(newest)
        run = configure(PHASES, name=f"run{number}")
        with pytest.raises(ResumeError, match=r"step_00000009 cannot be restored .*; remove it"):
            train(run)
    shutil.rmtree(newest)
    train(run)
    assert_identical(state_of(whole), state_of(folder))


def _truncate(checkpoint: Path):
    largest = max(checkpoint.rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def _lose_arrays(checkpoint: Path):
    shutil.rmtree(checkpoint / "state")


def _lose_position(checkpoint: Path):
    (checkpoint / "run.json").write_text("{")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.lr=1e-3", r"another train\.lr; restore"),
        ("train.max_steps=13", r"another train\.max_steps;"),
        ("train.seed=1", r"another train\.seed;"),
        ("data.shuffle_seed=1", r"another data\.shuffle_seed;"),
        ("diffusion.edit_loss=2", r"another diffusion\.edit_loss;"),
        ("phases.0.until=0.25", r"another phases;"),
        ("model.config_path=nano", r"another model\.config_path;"),
    ],
)
def test_another_configuration_is_refused(whole, configure, train, override, named):
    before = (whole / "config.yaml").read_bytes()
    with pytest.raises(ResumeError, match=named):
        train(configure(PHASES, f"train.output_dir={whole}", override))
    assert (whole / "config.yaml").read_bytes() == before


def test_settings_that_teach_nothing_may_change(copy, whole, configure, train):
    free = ["train.log_steps=3", "train.save_steps=0", "train.keep_checkpoints=1"]
    folder = copy(9)
    train(configure(PHASES, *free))
    assert saved_steps(folder / "checkpoints") == [12]
    assert_identical(state_of(whole), state_of(folder))
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["log_steps"] == 3


def test_other_data_are_refused(copy, configure, train, base, tmp_path):
    copy(9)
    other = tmp_path / "other.jsonl"
    other.write_text(Path(base["data"]["train_path"]).read_text() + '{"text": "one more"}\n')
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(base["data"]["train_path"], str(other)))
    with pytest.raises(DataError, match="not the same; changed: documents"):
        train(configure(PHASES, f"data.train_path={other}"))


def test_another_model_is_refused(copy, configure, train, base, tmp_path):
    copy(9)
    wider = yaml.safe_load(Path(base["model"]["config_path"]).read_text()) | {"hidden_size": 48}
    (tmp_path / "wider.yaml").write_text(yaml.safe_dump(wider))
    config = tmp_path / "run" / "config.yaml"
    config.write_text(
        config.read_text().replace(base["model"]["config_path"], str(tmp_path / "wider.yaml"))
    )
    with pytest.raises(ResumeError, match=r"has shape .* this run's has .*48"):
        train(configure(PHASES, f"model.config_path={tmp_path / 'wider.yaml'}"))


@pytest.mark.parametrize("damaged", ["", "{", "- 1"])
def test_a_damaged_record_of_the_configuration_is_written_again(
    copy, whole, configure, train, damaged
):
    folder = copy(9)
    (folder / "config.yaml").write_text(damaged)
    train(configure(PHASES), until=9)
    now = yaml.safe_load((folder / "config.yaml").read_text())
    assert now["phases"] == yaml.safe_load((whole / "config.yaml").read_text())["phases"]


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [("loss", jnp.nan, "the loss of step 5 is nan"), ("grad_norm", jnp.inf, "gradient of step 5")],
)
def test_what_is_not_finite_ends_the_run_before_it_is_saved(
    configure, train, monkeypatch, name, value, what
):
    make = loop.make_step

    def poisoned(*arguments):
        step = make(*arguments)

        def run(state, batch):
            after, metrics = step(state, batch)
            bad = metrics | {name: jnp.float32(value)}
            return after, (bad if int(after.step) == 5 else metrics)

        return run

    monkeypatch.setattr(loop, "make_step", poisoned)
    run = configure(PHASES, "train.log_steps=10")
    with pytest.raises(TrainingError, match=rf"{what}.*lower train\.lr.*checkpoint is of step 3"):
        train(run)
    folder = Path(run.train.output_dir)
    assert saved_steps(folder / "checkpoints") == [3]
    assert read_metrics(folder) == []
    monkeypatch.setattr(loop, "make_step", make)
    assert train(run).finished


def test_epochs_are_counted_in_packed_rows(configure, train, base):
    lines = Path(base["data"]["train_path"]).read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    padded = sum(-(-(len(text) + 1) // 8) * 8 for text in texts)
    rows = ("train.max_steps=null", "train.num_train_epochs=1.5")
    expected = -(-1.5 * padded / 32 // 8)
    assert setup.prepare(configure(*rows)).total_steps == int(expected)
    single = setup.prepare(configure(*rows, "data.packing=false")).total_steps
    assert single == -(-1.5 * len(texts) // 8)


def test_generated_tasks_have_no_epochs(configure, train):
    run = configure(
        "train.max_steps=null", "train.num_train_epochs=1", "data.train_path={task: addition}"
    )
    with pytest.raises(ConfigError, match=r"never end: give train\.max_steps"):
        train(run)


TRAINED = ["model.tokenizer_path=null", "model.tokenizer_vocab_size=384"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train_path=missing.jsonl"], r"missing\.jsonl"),
        (["data.train_path=EMPTY"], "no documents"),
        (["data.train_path=LONG"], "longer than max_seq_len"),
        (["data.train_path=BAD"], r"line 1"),
        (["data.train_path=missing.jsonl", *TRAINED], r"missing\.jsonl"),
        (["data.train_path=EMPTY", *TRAINED], "no documents to train a tokenizer on"),
        (["data.train_path=LONG", *TRAINED], "longer than max_seq_len"),
        (["data.train_path=BAD", *TRAINED], r"line 1"),
        (["data.validation_path=null", "train.eval_steps=2"], "there is no validation data"),
        (["train.global_batch_size=6", "train.fsdp=4"], "6 rows at a time cannot be spread over 4"),
        (["train.fsdp=8", "train.expert=3"], "do not fit: .* needs 24 devices"),
        (["train.fsdp=1", "train.tensor=4"], "'vocab' of size 261 does not divide"),
        (["train.fsdp=3", "train.global_batch_size=6", *TRAINED], "'embed' of size 32 does not"),
        (["model.tokenizer_path=nowhere"], "nowhere"),
        (["model.config_path=nowhere"], "no model configuration 'nowhere'"),
        (["train.tensorboard=true"], "tensorboardX"),
    ],
)
def test_what_cannot_start_leaves_nothing(
    configure, train, tmp_path, monkeypatch, overrides, message
):
    for name, text in (
        ("EMPTY", ""),
        ("LONG", json.dumps({"prompt": LONG, "response": "y"})),
        ("BAD", '{"text": \n{"text": "a b c 1 2 3"}\n'),
    ):
        (tmp_path / f"{name}.jsonl").write_text(text)
        overrides = [o.replace(f"={name}", f"={tmp_path}/{name}.jsonl") for o in overrides]
    if message == "tensorboardX":
        monkeypatch.setitem(sys.modules, "tensorboardX", None)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message) as raised:
        train(configure(*overrides))
    assert type(raised.value).__module__.startswith("llada_jax"), "so the program says one line"
    assert [p for p in sorted(tmp_path.iterdir()) if p.name != "cache"] == before


def test_a_folder_that_was_there_is_left_as_it_was(configure, train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(DataError):
        train(configure("data.train_path=missing.jsonl"))
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_a_tokenizer_is_trained_anew_until_there_is_a_checkpoint(configure, train, tmp_path):
    """An attempt that ended early may have been with other texts, or another size."""
    pieces = tmp_path / "run" / "tokenizer" / "tokenizer.model"
    (tmp_path / "other.txt").write_text("lorem ipsum dolor sit amet\n" * 9)
    setup.prepare(configure(*TRAINED))
    first = pieces.read_bytes()
    setup.prepare(configure(*TRAINED, f"data.train_path={tmp_path / 'other.txt'}"))
    assert pieces.read_bytes() != first
    (tmp_path / "run" / "checkpoints" / "step_00000001").mkdir(parents=True)
    second = pieces.read_bytes()
    setup.prepare(configure(*TRAINED))
    assert pieces.read_bytes() == second


def test_results_without_a_checkpoint_belong_to_their_configuration_too(
    copy, configure, train, tmp_path
):
    shutil.rmtree(copy(9) / "checkpoints")
    train(configure(PHASES, "train.lr=1e-3"), until=0)  # nothing but a log: begins anew
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "best" / "step_00000003").mkdir(parents=True)
    with pytest.raises(ResumeError, match=r"another train\.lr;"):
        train(configure(PHASES))


def test_ctrl_c_twice_ends_at_once_and_handlers_come_back():
    import signal

    before = signal.getsignal(signal.SIGINT)
    with loop._StopSignals() as stop:
        assert not stop.requested(1, 10)
        signal.raise_signal(signal.SIGINT)
        assert stop.requested(1, 10)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with loop._StopSignals() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested(1, 10)
    assert signal.getsignal(signal.SIGINT) is before
