"""A training run: resumable to the bit, and stopped by SIGTERM or Ctrl-C without losing a step."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from jax.experimental import multihost_utils

from llada_jax.checkpoint import save_hf
from llada_jax.checkpoint.staging import write_json
from llada_jax.compilation_cache import enable_compilation_cache
from llada_jax.diffusion import DiffusionConfig, Losses
from llada_jax.training.checkpoint import (
    ResumeError,
    load_checkpoint_state,
    save_checkpoint,
    saved_steps,
    step_folder,
)
from llada_jax.training.config import RunConfig
from llada_jax.training.flops import flops_per_clean_token, measured_peak_flops
from llada_jax.training.metrics import METRICS_FILE, MetricsLog
from llada_jax.training.optimizer import learning_rate, make_optimizer
from llada_jax.training.progress import TrainingProgress
from llada_jax.training.setup import Start, batches, place, prepare
from llada_jax.training.state import TrainState, new_state, state_shardings
from llada_jax.training.step import (
    StepFunction,
    batch_sharding,
    make_evaluation,
    make_step,
    summary,
)

# Settings that may differ when a run goes on: they change nothing that is learned.
_FREE = {
    "train": "micro_batch_size remat save_steps keep_checkpoints keep_best eval_steps log_steps "
    "save_hf_weights data fsdp expert tensor tensorboard wandb_project wandb_name output_dir",
    "data": "cache_dir validation_path",
}


class TrainingError(ValueError):
    """A run that cannot go on; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
      folder: of the run.
      step: optimizer steps done.
      finished: whether all steps are done; otherwise the same command goes on.
      metrics: the last ones logged.
    """

    folder: Path
    step: int
    finished: bool
    metrics: dict[str, float]


def train(run: RunConfig, *, progress: bool = True) -> RunResult:
    """Trains, or goes on training, what ``run`` describes.

    Args:
      run: the configuration.
      progress: show a bar, or lines, on the standard error.

    Returns:
      How far it came: SIGTERM and Ctrl-C save a checkpoint and return.

    Raises:
      ConfigError, DataError, CheckpointError, ResumeError: before anything is changed.
      TrainingError: if the loss is not finite; the last checkpoint stays.
    """
    enable_compilation_cache()
    folder = Path(run.train.output_dir)
    _check_same_run(folder, run)
    new = not folder.exists()
    try:
        return _Run(run, prepare(run), folder, progress).go()
    except Exception:
        if new and not (folder / METRICS_FILE).exists() and jax.process_index() == 0:
            shutil.rmtree(folder, ignore_errors=True)  # nothing was trained
        raise


class _Run:
    def __init__(self, run: RunConfig, start: Start, folder: Path, progress: bool):
        self.run, self.start, self.folder, self.progress = run, start, folder, progress
        self.total = start.total_steps
        self.optimizer = make_optimizer(run.train, self.total)
        self.rate = learning_rate(run.train, self.total)
        self.shardings = state_shardings(start.config, self.optimizer, start.mesh)
        self.rows = batch_sharding(start.mesh)
        self.compiled: dict[DiffusionConfig, StepFunction] = {}
        self.evaluate = None
        self.window: list[Any] = []  # metrics of the steps since the last line of the log
        self.last: dict[str, float] = {}

    def go(self) -> RunResult:
        if self.run.train.eval_steps:
            batches(self.run, self.start, "validation").close()  # an error now, not hours later
        data = batches(self.run, self.start, "train")
        try:
            state = self._state(data)
            if jax.process_index() == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                text = yaml.safe_dump(self.run.to_mapping(), sort_keys=False)
                partial = self.folder / ".config.yaml.partial"
                partial.write_text(text, encoding="utf-8")
                partial.replace(self.folder / "config.yaml")
            begin = int(state.step)
            with (
                _StopSignals() as stop,
                MetricsLog(
                    self.folder,
                    tensorboard=self.run.train.tensorboard,
                    wandb_project=self.run.train.wandb_project,
                    run_name=self.run.train.wandb_name,
                    resume_step=begin if begin else -1,
                ) as log,
                TrainingProgress(
                    self.total,
                    begin,
                    self.progress and jax.process_index() == 0,
                    self.run.train.log_steps,
                ) as bar,
            ):
                state = self._steps(state, data, stop, log, bar)
                done = int(state.step)
                self._save(state, done, data)
        finally:
            data.close()
        finished = done >= self.total
        if finished and self.run.train.save_hf_weights:
            self._export(self.folder / "hf", state.params)
        return RunResult(self.folder, done, finished, self.last)

    def _state(self, data: Any) -> TrainState:
        abstract = jax.eval_shape(
            lambda: TrainState(
                jnp.int32(0),
                params := jax.tree.map(lambda s: jnp.zeros(s.shape), self._shapes()),
                self.optimizer.init(params),
                jax.random.key_data(jax.random.key(0)),
            )
        )
        abstract = jax.tree.map(
            lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where),
            abstract,
            self.shardings,
        )
        found = load_checkpoint_state(self.folder, abstract)
        if found is not None:
            state, saved = found
            data.set_state(saved["data"])
            self.window = saved["window"]
            return state
        seed = self.run.train.seed
        params = self.start.initial_params(seed)
        return new_state(params, self.optimizer, seed, self.shardings)

    def _shapes(self) -> Any:
        return jax.eval_shape(
            lambda: self.start.model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
        )["params"]

    def _steps(self, state: TrainState, data: Any, stop, log, bar) -> TrainState:
        train = self.run.train
        step = int(state.step)
        peak = measured_peak_flops(self.start.model.dtype) * jax.device_count()
        clock, timed = time.perf_counter(), 0
        while step < self.total and not stop.requested(step, train.log_steps):
            diffusion = self._phase(step)
            compiling = diffusion not in self.compiled
            batch = place(next(data), self.run, self.rows)
            state, metrics = self._step_function(diffusion)(state, batch)
            step += 1
            self.window.append(metrics | _sizes(batch))
            if compiling:
                jax.block_until_ready(metrics)
                clock, timed = time.perf_counter(), 0
            else:
                timed += 1
            if step % train.log_steps == 0 or step == self.total:
                row = _averaged(self._known_window(step))
                elapsed = time.perf_counter() - clock
                tokens, share, length = (row.pop(name) for name in _SIZES)
                if timed:
                    speed = timed * tokens / elapsed
                    row["tokens_per_second"] = speed
                    needed = flops_per_clean_token(self.start.config, diffusion, length, share)
                    row["mfu"] = speed * needed / peak
                row["learning_rate"] = float(jnp.asarray(self.rate(step - 1)))
                log.write(step, row)
                bar.update(step, _shown(row))
                self.last, self.window = row, []
                clock, timed = time.perf_counter(), 0
            if train.eval_steps and (step % train.eval_steps == 0 or step == self.total):
                self._known_window(step)
                self._validate(state, step, log)
                clock, timed = time.perf_counter(), 0
            if train.save_steps and step % train.save_steps == 0 and step < self.total:
                self._save(state, step, data)
                clock, timed = time.perf_counter(), 0
        return state

    def _save(self, state: TrainState, step: int, data: Any) -> None:
        window = self._known_window(step)
        keep = self.run.train.keep_checkpoints
        save_checkpoint(self.folder, state, data.get_state(), keep, window)

    def _known_window(self, step: int) -> list[dict[str, float]]:
        """Metrics of the steps since the last line of the log, on the host.

        Raises:
          TrainingError: if one of them had no finite loss or gradient; ``step``'s weights are lost.
        """
        rows = [
            {name: float(value) for name, value in row.items()}
            for row in jax.device_get(self.window)
        ]
        for number, row in enumerate(rows, step - len(rows) + 1):
            for name, what in (("loss", "loss"), ("grad_norm", "norm of the gradient")):
                if not math.isfinite(row[name]):
                    raise TrainingError(
                        f"the {what} of step {number} is {row[name]}; lower train.lr or raise "
                        f"train.lr_warmup_ratio. {self._last_saved()}"
                    )
        return rows

    def _phase(self, step: int) -> DiffusionConfig:
        for phase in self.run.phases:
            if step < round(phase.until * self.total):
                return phase.diffusion
        return self.run.phases[-1].diffusion

    def _step_function(self, diffusion: DiffusionConfig) -> StepFunction:
        if diffusion not in self.compiled:
            self.compiled[diffusion] = make_step(
                self.start.model,
                diffusion,
                self.run.train,
                self.optimizer,
                self.shardings,
                self.start.mesh,
            )
        return self.compiled[diffusion]

    def _validate(self, state: TrainState, step: int, log: MetricsLog) -> None:
        """The loss of the last phase's objective, with the same noise every time."""
        diffusion = self.run.phases[-1].diffusion
        if self.evaluate is None:
            self.evaluate = make_evaluation(
                self.start.model, diffusion, self.shardings, self.start.mesh
            )
        joined: Losses | None = None
        data = batches(self.run, self.start, "validation")
        try:
            for number, batch in enumerate(data):
                placed = place(batch, self.run, self.rows)
                for i in range(self.run.train.accumulation):
                    one = {name: x[i : i + 1] for name, x in placed.items()}
                    key = jax.random.fold_in(jax.random.key(0), number * 1000 + i)
                    losses = self.evaluate(state.params, one, key)
                    joined = losses if joined is None else joined + losses
        finally:
            data.close()
        assert joined is not None
        row = {name: float(value) for name, value in summary(joined).items()}
        log.write(step, row, split="validation")
        if self.run.train.keep_best:
            self._keep_best(state, step, row["loss"])

    def _keep_best(self, state: TrainState, step: int, loss: float) -> None:
        parent = self.folder / "best"
        if jax.process_index() == 0:
            for left in parent.glob(".step_*.partial"):  # of a run that was killed
                shutil.rmtree(left, ignore_errors=True)
        kept = {
            s: json.loads((step_folder(parent, s) / "validation.json").read_text())["loss"]
            for s in saved_steps(parent)
            if (step_folder(parent, s) / "validation.json").is_file()
        }
        keep = self.run.train.keep_best
        full = len(kept) >= keep
        if step in kept or not math.isfinite(loss) or (full and loss >= max(kept.values())):
            return
        self._export(step_folder(parent, step), state.params, {"step": step, "loss": loss})
        kept[step] = loss
        if jax.process_index() == 0:
            for worse in sorted(kept, key=lambda s: kept[s])[keep:]:
                shutil.rmtree(step_folder(parent, worse), ignore_errors=True)

    def _export(self, folder: Path, params: Any, validation: dict[str, Any] | None = None) -> None:
        """Hugging Face layout; bfloat16 after mixed precision, but for the router."""
        if folder.exists():
            return
        dtype = self.start.model.dtype

        def stored(path: Any, weight: jax.Array) -> jax.Array:
            router = "router" in jax.tree_util.keystr(path)
            return weight if router else weight.astype(dtype)

        params = jax.tree_util.tree_map_with_path(stored, params)
        if jax.process_count() > 1:  # save_hf takes whole weights
            params = jax.tree.map(
                lambda w: np.asarray(multihost_utils.process_allgather(w, tiled=True)), params
            )
        with tempfile.TemporaryDirectory() as temporary:
            files = list(self.start.tokenizer_files)
            if validation is not None:
                files.append(Path(temporary) / "validation.json")
                write_json(files[-1], validation)
            save_hf(
                folder,
                self.start.config,
                params,
                source_config=self.start.source_config,
                extra_files=files,
            )

    def _last_saved(self) -> str:
        steps = saved_steps(self.folder / "checkpoints")
        return f"The last checkpoint is of step {steps[-1]}" if steps else "No checkpoint was saved"


class _StopSignals:
    """SIGTERM and the first Ctrl-C ask for an end after the current step."""

    def __init__(self):
        self._asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True

    def requested(self, step: int, every: int) -> bool:
        """Whether to stop; several processes agree on it every so many steps."""
        if jax.process_count() == 1:
            return self._asked
        if step % every:
            return False
        return bool(multihost_utils.process_allgather(np.array(self._asked)).any())


_SIZES = ("clean_tokens", "supervised_share", "document_length")


def _sizes(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """What the operations of a step depend on; padding does not count."""
    real = batch["document"] > 0
    tokens = jnp.maximum(real.sum(), 1)
    mean_position = jnp.where(real, batch["positions"], 0).sum() / tokens
    share = (batch["supervised"] & real).sum() / tokens
    return dict(zip(_SIZES, (tokens, share, 2 * mean_position + 1), strict=True))


def _averaged(rows: list[dict[str, float]]) -> dict[str, float]:
    """Means by name; NaN is what did not occur in a step."""
    result = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = np.array([row[name] for row in rows if name in row], np.float64)
        known = values[~np.isnan(values)]
        if len(known):
            result[name] = float(known.mean())
    return result


def _shown(row: dict[str, float]) -> dict[str, float]:
    """The names that the progress display knows."""
    short = {"m2t_loss": "m2t", "t2t_loss": "t2t", "keep_loss": "keep"}
    return {short.get(name, name): value for name, value in row.items()}


def _check_same_run(folder: Path, run: RunConfig) -> None:
    """A folder belongs to one configuration.

    Raises:
      ResumeError: if it holds checkpoints, or exported models, of another.
    """
    file = folder / "config.yaml"
    results = saved_steps(folder / "checkpoints") or saved_steps(folder / "best")
    if not (results or (folder / "hf").is_dir()) or not file.is_file():
        return
    with contextlib.suppress(yaml.YAMLError):
        before = yaml.safe_load(file.read_text(encoding="utf-8"))
        now = yaml.safe_load(yaml.safe_dump(run.to_mapping()))
        if not isinstance(before, dict):
            return
        changed = [name for name, was, is_now in _differences(before, now)]
        if changed:
            raise ResumeError(
                f"{folder} holds a run with another {', '.join(changed)}; restore the "
                "configuration, or use another train.output_dir"
            )


def _differences(before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    for section in now:
        was, is_now = before.get(section), now[section]
        if not isinstance(is_now, dict) or not isinstance(was, dict):
            if was != is_now:
                yield section, was, is_now
            continue
        for name in is_now:
            if name not in _FREE.get(section, "").split() and was.get(name) != is_now[name]:
                yield f"{section}.{name}", was.get(name), is_now[name]
