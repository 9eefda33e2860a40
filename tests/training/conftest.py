import math

import jax
import pytest

from llada_jax.parallel import make_mesh
from llada_jax.training import RunConfig, config, loop, optimizer, setup, step
from tests.training.tiny import write_files


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A configuration's mapping, without ``train.output_dir``."""
    return write_files(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def configure(base, tmp_path):
    """Makes a ``RunConfig`` from the tiny one and overrides, for a run in ``tmp_path / name``."""

    def make(*overrides: str, name: str = "run") -> RunConfig:
        folder = f"train.output_dir={tmp_path / name}"
        return RunConfig.from_mapping(config.apply_overrides(base, [folder, *overrides]))

    return make


_made: dict = {}


def _once(key, make):
    """What is compiled is shared by the session's runs."""
    if key not in _made:
        _made[key] = make()
    return _made[key]


@pytest.fixture
def train(monkeypatch):
    """``train(run)`` on as many devices as ``run`` asks for; ``until=k`` ends it after step k."""

    def make_optimizer(section, total):
        names = "lr lr_min lr_warmup_ratio lr_decay_style lr_decay_ratio beta1 beta2 eps"
        names += " weight_decay max_grad_norm"
        key = (total, *(getattr(section, name) for name in names.split()))
        return _once(key, lambda: optimizer.make_optimizer(section, total))

    def make_step(model, diffusion, section, adamw, shardings, mesh):
        own = (section.expert_bias_update_rate, section.train_pad_embedding)
        key = (model.config, model.dtype, model.remat, diffusion, own, id(adamw), mesh)
        return _once(key, lambda: step.make_step(model, diffusion, section, adamw, shardings, mesh))

    def make_evaluation(model, diffusion, shardings, mesh):
        key = ("evaluation", model.config, model.dtype, diffusion, mesh)
        return _once(key, lambda: step.make_evaluation(model, diffusion, shardings, mesh))

    def initial_params(start, seed):
        return _once((start.config, seed), lambda: draw(start, seed))

    def mesh_of_first(**axes):
        return make_mesh(**axes, devices=jax.devices()[: math.prod(axes.values())])

    def shapes(runner):
        return _once(("shapes", runner.start.config), lambda: shapes_of(runner))

    draw, shapes_of = setup.Start.initial_params, loop._Run._shapes
    monkeypatch.setattr(loop._Run, "_shapes", shapes)
    monkeypatch.setattr(setup.Start, "initial_params", initial_params)
    monkeypatch.setattr(setup, "make_mesh", mesh_of_first)
    monkeypatch.setattr(loop, "make_optimizer", make_optimizer)
    monkeypatch.setattr(loop, "make_step", make_step)
    monkeypatch.setattr(loop, "make_evaluation", make_evaluation)
    monkeypatch.setattr(loop, "measured_peak_flops", lambda dtype: 1e9)

    def go(run: RunConfig, until: int | None = None):
        with monkeypatch.context() as patch:
            if until is not None:
                patch.setattr(loop._StopSignals, "requested", lambda _, now, every: now >= until)
            return loop.train(run, progress=False)

    return go
