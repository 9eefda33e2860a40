"""Accuracy against speed: what a threshold buys, with editing and without."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from llada_jax.viz.figures import FigureError, colour, save, style

_NUMBERS = ("threshold", "accuracy", "tokens_per_forward")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_ON, _OFF = "-", (0, (4, 2.5))  # line styles


def plot_tradeoff(
    points: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    title: str = "",
    accuracy_label: str = "accuracy",
) -> list[Path]:
    """Draws accuracy (up) against tokens per forward pass (right), a line a variant.

    Editing on is a solid line with filled markers, off a dashed one with hollow markers; the
    threshold stands beside each point, error bars show the spread over seeds.

    Args:
      points: dictionaries with ``variant`` (a name), ``editing`` (bool), ``threshold``,
        ``accuracy``, ``tokens_per_forward``, and if known ``accuracy_std`` and
        ``tokens_per_forward_std``. Points of a line are joined in the order of their thresholds.
      path: ends in ``.png`` or ``.svg``; without either, both are written.
      title: above the picture.
      accuracy_label: of the upward axis.

    Returns:
      The files.

    Raises:
      FigureError: if there are no points, one is incomplete, or matplotlib is not installed.
    """
    lines = _lines(points)
    path = Path(path)
    kinds = (path.suffix,) if path.suffix in (".png", ".svg") else (".png", ".svg")
    stem = path.with_suffix("") if path.suffix == kinds[0] else path
    with style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        axes = figure.add_subplot()
        variants = list(dict.fromkeys(variant for variant, _ in lines))
        for (variant, editing), line in lines.items():
            _draw(axes, variants.index(variant), editing, line)
        axes.set_xlabel("tokens per forward pass")
        axes.set_ylabel(accuracy_label)
        axes.set_title(title)
        note = (
            "numbers: threshold; bars: spread over seeds"
            if _spread(lines)
            else ("numbers: threshold")
        )
        axes.set_title(note, loc="right", fontsize=7.5, fontweight="normal", color="#666666")
        axes.margins(0.09)
        _legend(axes, variants, {editing for _, editing in lines})
        figure.draw_without_rendering()  # places are known from here on
        _write_thresholds(axes, [(variants.index(v), line) for (v, _), line in lines.items()])
        return [save(figure, f"{stem}{kind}") for kind in kinds]


def _lines(
    points: Sequence[Mapping[str, Any]],
) -> dict[tuple[str, bool], list[dict[str, float]]]:
    """``{(variant, editing): points}``, each in the order of thresholds."""
    if not points:
        raise FigureError("there are no points to draw; measure at least one threshold")
    lines: dict[tuple[str, bool], list[dict[str, float]]] = {}
    for number, point in enumerate(points):
        missing = [k for k in ("variant", "editing", *_NUMBERS) if point.get(k) is None]
        if missing:
            raise FigureError(f"point {number} lacks {', '.join(missing)}; give all of them")
        values = {name: float(point[name]) for name in _NUMBERS}
        for name in ("accuracy_std", "tokens_per_forward_std"):
            values[name] = float(point.get(name) or 0.0)
        if not all(math.isfinite(value) for value in values.values()):
            raise FigureError(f"point {number} holds a value that is not finite; leave it out")
        lines.setdefault((str(point["variant"]), bool(point["editing"])), []).append(values)
    for line in lines.values():
        line.sort(key=lambda values: values["threshold"])
    return dict(sorted(lines.items(), key=lambda item: not item[0][1]))  # editing on first


def _draw(axes: Any, number: int, editing: bool, line: Sequence[Mapping[str, float]]) -> None:
    paint = colour(number)
    axes.errorbar(
        [p["tokens_per_forward"] for p in line],
        [p["accuracy"] for p in line],
        xerr=_bars(line, "tokens_per_forward_std"),
        yerr=_bars(line, "accuracy_std"),
        color=paint,
        linestyle=_ON if editing else _OFF,
        linewidth=1.5,
        elinewidth=0.8,
        capsize=2,
        marker=_MARKERS[number % len(_MARKERS)],
        markersize=6,
        markerfacecolor=paint if editing else "white",
        markeredgecolor=paint,
        markeredgewidth=1.4,
        zorder=3 if editing else 2,
    )


def _bars(line: Sequence[Mapping[str, float]], name: str) -> list[float] | None:
    bars = [p[name] for p in line]
    return bars if any(bars) else None


def _spread(lines: Mapping[Any, Sequence[Mapping[str, float]]]) -> bool:
    return any(
        p["accuracy_std"] or p["tokens_per_forward_std"] for line in lines.values() for p in line
    )


def _legend(axes: Any, variants: Sequence[str], modes: set[bool]) -> None:
    """Below the plot: variants by colour on the left, what solid and dashed mean on the right."""
    from matplotlib.lines import Line2D

    by_colour = [
        Line2D([], [], color=colour(i), marker=_MARKERS[i % len(_MARKERS)], label=variant)
        for i, variant in enumerate(variants)
    ]
    by_line = [
        Line2D(
            [],
            [],
            color="#555555",
            linestyle=_ON if editing else _OFF,
            marker="o",
            markerfacecolor="#555555" if editing else "white",
            label="editing on" if editing else "editing off",
        )
        for editing in sorted(modes, reverse=True)
    ]
    axes.figure.legend(handles=by_colour, loc="outside lower left", ncols=2)
    axes.figure.legend(handles=by_line, loc="outside lower right", ncols=1, handlelength=3.2)


def _write_thresholds(
    axes: Any, lines: Sequence[tuple[int, Sequence[Mapping[str, float]]]]
) -> None:
    """Puts each threshold on the side of its point where it covers least."""
    scale = axes.figure.dpi / 72
    taken = [_box(*_pixels(axes, p), 4.5 * scale, 4.5 * scale) for _, line in lines for p in line]
    segments = [_pixels_between(axes, a, b) for _, line in lines for a, b in pairwise(line)]
    segments += [bar for _, line in lines for p in line for bar in _bar_places(axes, p)]
    samples = [place for segment in segments for place in segment]
    frame = axes.get_window_extent()
    for number, line in lines:
        for point in line:
            x, y = _pixels(axes, point)
            text = f"{point['threshold']:g}"
            half = (2.4 * len(text) * scale, 4.0 * scale)
            best = None
            for reach in (9, 13, 18):
                for turn in range(16):
                    angle = math.tau * (turn + 2) / 16
                    dx = math.cos(angle) * (reach + half[0] / scale - 3)
                    dy = math.sin(angle) * reach
                    box = _box(x + dx * scale, y + dy * scale, *half)
                    cost = 3.0 * sum(_overlap(box, other) for other in taken) + reach / 100
                    cost += sum(_holds(box, place) for place in samples)
                    cost += 100.0 * (not _inside(box, frame))
                    if best is None or cost < best[0]:
                        best = (cost, dx, dy, box)
            assert best is not None
            _, dx, dy, box = best
            taken.append(box)
            axes.annotate(
                text,
                (point["tokens_per_forward"], point["accuracy"]),
                xytext=(dx, dy),
                textcoords="offset points",
                ha="center",
                va="center",
                fontsize=7,
                color=colour(number),
                zorder=4,
            )


_Box = tuple[float, float, float, float]  # left, bottom, right, top, in pixels


def _pixels(axes: Any, point: Mapping[str, float]) -> tuple[float, float]:
    x, y = axes.transData.transform((point["tokens_per_forward"], point["accuracy"]))
    return float(x), float(y)


def _pixels_between(
    axes: Any, a: Mapping[str, float], b: Mapping[str, float]
) -> list[tuple[float, float]]:
    """Places along a line, about every three pixels."""
    (x, y), (u, v) = _pixels(axes, a), _pixels(axes, b)
    count = max(2, int(math.hypot(u - x, v - y) / 3))
    return [(x + (u - x) * i / count, y + (v - y) * i / count) for i in range(count + 1)]


def _bar_places(axes: Any, p: Mapping[str, float]) -> list[list[tuple[float, float]]]:
    """Places along the two error bars of a point."""
    bars = []
    for name in ("accuracy", "tokens_per_forward"):
        low = {**p, name: p[name] - p[f"{name}_std"]}
        high = {**p, name: p[name] + p[f"{name}_std"]}
        bars.append(_pixels_between(axes, low, high))
    return bars


def _box(x: float, y: float, half_width: float, half_height: float) -> _Box:
    return x - half_width, y - half_height, x + half_width, y + half_height


def _overlap(a: _Box, b: _Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def _holds(box: _Box, place: tuple[float, float]) -> bool:
    return box[0] <= place[0] <= box[2] and box[1] <= place[1] <= box[3]


def _inside(box: _Box, frame: Any) -> bool:
    x, y, u, v = (float(edge) for edge in frame.extents)
    return x <= box[0] and y <= box[1] and box[2] <= u and box[3] <= v
