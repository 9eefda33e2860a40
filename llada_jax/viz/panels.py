"""From the lines of training logs to panels of curves, before anything is drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

_SMOOTH_FROM = 60  # shorter curves are drawn as they are
_LOG_RATIO = 30  # range of a panel from which its axis is logarithmic


@dataclasses.dataclass(frozen=True)
class Spec:
    """A panel that is always drawn in its place if there are values for it.

    Attributes:
      title: above the panel.
      split: ``"train"`` or ``"validation"``.
      names: metrics, each with the label it gets; several labels share a panel.
      smooth: draw a running mean over the raw curve.
      log: the axis may be logarithmic, and the running mean is a geometric one.
      at_least: the panel is left out if it would show fewer metrics.
    """

    title: str
    split: str
    names: Mapping[str, str]
    smooth: bool = True
    log: bool = False
    at_least: int = 1


_KINDS = {"m2t": "M2T", "t2t": "T2T", "keep": "keep"}
_LOSSES = {f"{kind}_loss": label for kind, label in _KINDS.items()}
_ACCURACIES = {f"{kind}_accuracy": label for kind, label in _KINDS.items()}
_TERMS = {"diffusion_term": "diffusion", "confidence_term": "CAP", "z_term": "router z"}

PANELS = (
    Spec("Training loss", "train", {"loss": "loss"}),
    Spec("Training loss by kind of token", "train", _LOSSES),
    Spec("Training accuracy by kind of token", "train", _ACCURACIES),
    Spec("Validation loss", "validation", {"loss": "loss"}, smooth=False),
    Spec("Validation loss by kind of token", "validation", _LOSSES, smooth=False),
    Spec("Validation accuracy by kind of token", "validation", _ACCURACIES, smooth=False),
    Spec("Terms of the training loss", "train", _TERMS, at_least=2),
    Spec("Terms of the validation loss", "validation", _TERMS, smooth=False, at_least=2),
    Spec("Entropy where right", "train", {"entropy": "entropy"}),
    Spec("Validation entropy where right", "validation", {"entropy": "entropy"}, smooth=False),
    Spec("Gradient norm", "train", {"grad_norm": "norm"}, log=True),
    Spec("Learning rate", "train", {"learning_rate": "rate"}, smooth=False),
    Spec("Expert load imbalance, max / mean", "train", {"expert_imbalance": "imbalance"}),
    Spec("Clean tokens / s", "train", {"tokens_per_second": "tokens/s"}),
    Spec("Model FLOP utilisation", "train", {"mfu": "MFU"}),
    Spec("Supervised masks a step", "train", {"m2t_tokens": "tokens"}),
)
_NOT_DRAWN = {("validation", "m2t_tokens"), ("validation", "expert_imbalance")}


@dataclasses.dataclass(frozen=True)
class Curve:
    """One metric of one run.

    Attributes:
      run: the run's name.
      label: what is measured.
      steps, values: ``[N]``, in order; a value that was not finite is NaN.
      smooth: ``[N]``, or ``None`` if there is nothing to smooth.
      colour: number of the colour.
      dash: number of the line style; 0 is solid.
    """

    run: str
    label: str
    steps: np.ndarray
    values: np.ndarray
    smooth: np.ndarray | None
    colour: int
    dash: int

    @property
    def line(self) -> np.ndarray:
        """What is drawn in full strength."""
        return self.values if self.smooth is None else self.smooth


@dataclasses.dataclass(frozen=True)
class Panel:
    """Curves with common axes.

    Attributes:
      title: above it.
      steps: where the axis begins and ends; the same for all panels of a page.
      log: whether the values' axis is logarithmic.
      curves: what is drawn.
    """

    title: str
    steps: tuple[float, float]
    log: bool
    curves: Sequence[Curve]

    def name(self, curve: Curve) -> str:
        """What tells a curve from all others of the page: run and label, as far as they vary."""
        several_labels = len({c.label for c in self.curves}) > 1
        several_runs = len({c.run for c in self.curves}) > 1
        if several_runs:
            return f"{curve.run}, {curve.label}" if several_labels else curve.run
        return curve.label

    def legend(self) -> list[Curve]:
        """One curve for each label, if there are several (runs have a legend of their own)."""
        first = {curve.label: curve for curve in reversed(self.curves)}
        return list(reversed(first.values())) if len(first) > 1 else []


def build_panels(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Panel]:
    """Sorts what was logged into panels.

    With one run a colour is a metric; with several a colour is a run and a line style a metric.
    Metrics that no panel of the table asks for get panels of their own at the end.

    Args:
      runs: lines of ``read_metrics`` by the run's name.
    """
    specs = [*PANELS, *_others(runs)]
    steps = _span([row["step"] for rows in runs.values() for row in rows])
    panels = []
    for spec in specs:
        curves = [
            curve
            for number, (run, rows) in enumerate(runs.items())
            for part, (metric, label) in enumerate(spec.names.items())
            if (curve := _curve(run, number, rows, spec, metric, label, part, len(runs)))
        ]
        if len({curve.label for curve in curves}) >= spec.at_least:
            panels.append(Panel(spec.title, steps, spec.log and _wide(curves), curves))
    return panels


def last_values(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """``{"step": …, "train": {name: value}, "validation": {…}}``: the last of every metric."""
    last: dict[str, Any] = {"step": 0, "train": {}, "validation": {}}
    for row in rows:
        last["step"] = max(last["step"], row["step"])
        values = last.setdefault(row.get("split", "train"), {})
        values.update({k: v for k, v in row.items() if k not in ("step", "split")})
    return last


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """A mean over ``window`` values around each, fewer at the ends.

    NaN does not count; where all are NaN, the mean is.
    """
    places = np.arange(len(values))
    low = np.maximum(places - window // 2, 0)
    high = np.minimum(places + window // 2 + 1, len(values))
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    count = counts[high] - counts[low]
    return np.where(count > 0, (sums[high] - sums[low]) / np.maximum(count, 1), np.nan)


def _span(steps: Sequence[int]) -> tuple[float, float]:
    first, last = float(min(steps, default=0)), float(max(steps, default=1))
    if 0 < first <= 0.1 * last:
        first = 0.0
    return (first, last) if last > first else (first - 1.0, first + 1.0)


def _others(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Spec]:
    known = {(spec.split, name) for spec in PANELS for name in spec.names}
    lines = [row for rows in runs.values() for row in rows]
    found = {(row.get("split", "train"), name) for row in lines for name in row}
    return [
        Spec(name if split == "train" else f"{split.capitalize()}: {name}", split, {name: name})
        for split, name in sorted(found - known - _NOT_DRAWN)
        if name not in ("step", "split")
    ]


def _curve(
    run: str,
    number: int,
    rows: Sequence[Mapping[str, Any]],
    spec: Spec,
    metric: str,
    label: str,
    part: int,
    num_runs: int,
) -> Curve | None:
    points = {
        row["step"]: np.nan if row[metric] is None else float(row[metric])
        for row in rows
        if row.get("split", "train") == spec.split and metric in row
    }
    if not points:
        return None
    steps = np.array(sorted(points))
    values = np.array([points[step] for step in steps])
    smooth = None
    if spec.smooth and len(values) >= _SMOOTH_FROM:
        window = max(5, len(values) // 30)
        if spec.log and (values[np.isfinite(values)] > 0).all():
            smooth = np.exp(running_mean(np.log(values), window))  # a spike stays a spike
        else:
            smooth = running_mean(values, window)
    colour, dash = (part, 0) if num_runs == 1 else (number, part)
    return Curve(run, label, steps, values, smooth, colour, dash)


def _wide(curves: Sequence[Curve]) -> bool:
    values = np.concatenate([c.values[np.isfinite(c.values)] for c in curves])
    return bool(values.size and values.min() > 0 and values.max() > _LOG_RATIO * values.min())
