"""Training curves as a picture, and as one HTML file.

RUN/metrics.jsonl ─ read_metrics ─► panels ─┬─ matplotlib ─► curves.png
                                            └─ inline SVG ─► curves.html
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llada_jax.training.metrics import METRICS_FILE, read_metrics
from llada_jax.viz.curves_html import curves_page
from llada_jax.viz.figures import FigureError, colour, save, style
from llada_jax.viz.panels import Panel, build_panels
from llada_jax.viz.svg_panel import shown

FORMATS = ("png", "html")

_COLUMNS = 3
_FEW = 20  # shorter curves show their points
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))


def read_runs(folders: Sequence[str | os.PathLike[str]]) -> dict[str, list[dict[str, Any]]]:
    """The logs of training runs by name: the last part of a folder's path that tells them apart.

    Args:
      folders: of the runs; a ``metrics.jsonl`` may be given too.

    Raises:
      MetricsError: if one has no log, or a damaged one.
      FigureError: if a folder is given twice.
    """
    paths = [Path(folder).absolute() for folder in folders]
    paths = [path.parent if path.name == METRICS_FILE else path for path in paths]
    if len(set(paths)) < len(paths):
        raise FigureError("a run is given twice; give every run once")
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return {name: read_metrics(path) for name, path in zip(names, paths, strict=True)}


def draw_curves(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    out: str | os.PathLike[str],
    formats: Sequence[str] = FORMATS,
) -> list[Path]:
    """Writes ``curves.png`` and ``curves.html``.

    Args:
      runs: lines of ``read_metrics`` by the run's name; several are drawn into the same panels.
      out: the folder to write to.
      formats: ``"png"``, ``"html"`` or both.

    Returns:
      The files.

    Raises:
      FigureError: if nothing is logged, or matplotlib is not installed (for ``"png"``).
    """
    panels = build_panels(runs)
    if not panels:
        raise FigureError(f"{', '.join(runs)}: nothing is logged yet; train some steps first")
    out = Path(out)
    files = []
    if "png" in formats:
        files.append(_picture(panels, list(runs), out / "curves.png"))
    if "html" in formats:
        out.mkdir(parents=True, exist_ok=True)
        page = out / "curves.html"
        page.write_text(curves_page(panels, runs), encoding="utf-8")
        files.append(page)
    return files


def _picture(panels: Sequence[Panel], runs: Sequence[str], file: Path) -> Path:
    with style():
        from matplotlib.figure import Figure

        columns = min(_COLUMNS, len(panels))
        rows = math.ceil(len(panels) / columns)
        figure = Figure(figsize=(4.4 * columns, 2.7 * rows + 0.5), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)  # type: ignore[union-attr]
        if len(runs) == 1:
            figure.suptitle(runs[0], x=0.01, ha="left", fontsize=11, color="#555555")
        else:
            entries = [_key(run, colour(number)) for number, run in enumerate(runs)]
            figure.legend(handles=entries, loc="outside upper left", ncols=4, fontsize=10)
        for place, panel in enumerate(panels, 1):
            _fill(figure.add_subplot(rows, columns, place), panel, len(runs))
        return save(figure, file)


def _fill(axes: Any, panel: Panel, num_runs: int) -> None:
    from matplotlib.ticker import MaxNLocator, NullFormatter

    for curve in panel.curves:
        paint: dict[str, Any] = {"color": colour(curve.colour)}
        if curve.smooth is not None:
            axes.plot(curve.steps, curve.values, linewidth=0.6, alpha=0.3, **paint)
        points = len(curve.steps) < _FEW or not np.isfinite(curve.line).all()
        axes.plot(
            curve.steps,
            curve.line,
            linestyle=_DASHES[curve.dash % len(_DASHES)],
            linewidth=1.5,
            marker="o" if points else "",
            markersize=3 if len(curve.steps) < _FEW else 1.5,
            **paint,
        )
    axes.set_title(panel.title)
    axes.set_xlabel("step")
    space = 0.02 * (panel.steps[1] - panel.steps[0])
    axes.set_xlim(panel.steps[0] - space, panel.steps[1] + space)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: shown(value))
    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(lambda value, _: shown(value))
    if panel.legend():
        keys = [
            _key(c.label, colour(c.colour) if num_runs == 1 else "#555555", c.dash)
            for c in panel.legend()
        ]
        axes.legend(handles=keys, loc="best")


def _key(label: str, paint: str, dash: int = 0) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=paint, linestyle=_DASHES[dash % len(_DASHES)], label=label)
