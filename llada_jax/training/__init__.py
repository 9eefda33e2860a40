"""Training: step, loop, optimizer, schedules, metrics, checkpoint merging."""

from llada_jax.training.config import Phase, RunConfig, load_run_config
from llada_jax.training.loop import RunResult, TrainingError, train
from llada_jax.training.metrics import MetricsLog, read_metrics
from llada_jax.training.step import loss_gradients, make_step

__all__ = [
    "MetricsLog",
    "Phase",
    "RunConfig",
    "RunResult",
    "TrainingError",
    "load_run_config",
    "loss_gradients",
    "make_step",
    "read_metrics",
    "train",
]
