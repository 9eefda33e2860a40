"""Reading checkpoints and logs back, and comparing them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from llada_jax.training import RunConfig, read_metrics
from llada_jax.training.checkpoint import saved_steps, step_folder

TIMINGS = ("tokens_per_second", "mfu")


def state_of(run: RunConfig | Path, step: int | None = None) -> dict[str, np.ndarray]:
    """The leaves of a run's checkpoint by name; the newest by default."""
    parent = Path(run.train.output_dir if isinstance(run, RunConfig) else run) / "checkpoints"
    return read_state(step_folder(parent, saved_steps(parent)[-1] if step is None else step))


def read_state(folder: Path) -> dict[str, np.ndarray]:
    """The leaves of a checkpoint by name."""
    names = ocp.metadata(str(folder / "state")).metadata
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
        for name, leaf in names.items()
    }
    return {k: np.asarray(v) for k, v in ocp.load(str(folder / "state"), wanted).items()}


def assert_identical(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    """Equal in every bit."""
    assert a.keys() == b.keys()
    assert [name for name in a if a[name].tobytes() != b[name].tobytes()] == []


def assert_close(a: dict[str, np.ndarray], b: dict[str, np.ndarray], tolerance: float) -> None:
    """Weights equal up to ``tolerance``; the rest of the state as close as that allows."""
    assert a.keys() == b.keys()
    for name in a:
        if name.startswith("params/"):
            np.testing.assert_allclose(a[name], b[name], rtol=0, atol=tolerance, err_msg=name)


def log_of(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's log without what depends on the clock."""
    return [{k: v for k, v in r.items() if k not in TIMINGS} for r in read_metrics(folder)]
