"""One panel of curves as inline SVG, without matplotlib."""

from __future__ import annotations

import dataclasses
import html
import math

import numpy as np

from llada_jax.viz.panels import Curve, Panel

WIDTH, HEIGHT = 480, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 26  # margins around the plot

_POINTS = 600  # a curve is thinned to about as many
_DASHES = ("", "7 3", "2 3", "7 3 2 3")


@dataclasses.dataclass(frozen=True)
class Frame:
    """The axes: ranges in data, and where they lie in the drawing."""

    steps: tuple[float, float]
    values: tuple[float, float]
    log: bool

    def x(self, step: float) -> float:
        """Where a step is."""
        low, high = self.steps
        return LEFT + (step - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Where a value is."""
        low, high = self.values
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)


def frame(panel: Panel) -> Frame:
    """Axes that hold all curves of a panel."""
    values = np.concatenate([c.values for c in panel.curves])
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    if panel.log:
        span = (low / 1.2, high * 1.2)
    else:
        pad = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
        span = (0.0 if 0 <= low < 2 * pad else low - pad, high + pad)
    return Frame(panel.steps, span, panel.log)


def draw_panel(panel: Panel) -> str:
    """The ``<svg>`` element; colours are the page's CSS variables ``--c0`` to ``--c6``."""
    axes = frame(panel)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(panel.title)}">'
    ]
    for value in ticks(*axes.values, log=axes.log):
        y = axes.y(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" class="end">{shown(value)}</text>')
    for step in ticks(*axes.steps, log=False):
        if step == int(step):
            parts.append(
                f'<text x="{axes.x(step):.1f}" y="{HEIGHT - 8}" class="mid">{shown(step)}</text>'
            )
    parts.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    for curve in panel.curves:
        if curve.smooth is not None:
            parts.append(_path(curve, curve.values, axes, "raw"))
        parts.append(_path(curve, curve.line, axes, "line"))
    parts.append(f'<path class="cursor" d="M0 {TOP}V{HEIGHT - BOTTOM}"/></svg>')
    return "".join(parts)


def swatch(colour: int | None, dash: int = 0) -> str:
    """A short piece of line for a legend; without a colour in that of text."""
    paint = "currentColor" if colour is None else f"var(--c{colour % 7})"
    return (
        f'<svg class="swatch" viewBox="0 0 24 8"><path class="line" d="M1 4H23" '
        f'stroke="{paint}"{_dash(dash)}/></svg>'
    )


def thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most about 600 points, which keep the extremes of every stretch that they stand for."""
    if len(steps) <= _POINTS:
        return steps, values
    keep: set[int] = {0, len(steps) - 1}
    for part in np.array_split(np.arange(len(steps)), _POINTS // 2):
        finite = part[np.isfinite(values[part])]
        if len(finite) < len(part):
            keep.add(int(part[~np.isfinite(values[part])][0]))  # the gap stays visible
        if len(finite):
            keep |= {
                int(finite[values[finite].argmin()]),
                int(finite[values[finite].argmax()]),
            }
    index = np.array(sorted(keep))
    return steps[index], values[index]


def ticks(low: float, high: float, *, log: bool) -> list[float]:
    """About five round numbers between two values."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for mantissas in ((1,), (1, 3), (1, 2, 5)):
            marks = [m * 10.0**p for p in powers for m in mantissas if low <= m * 10.0**p <= high]
            if len(marks) >= 3:
                break
        return marks[:: max(1, len(marks) // 5)]
    raw = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def shown(value: float) -> str:
    """A number in few characters: 0.25, 12k, 2.5e-5."""
    size = abs(value)
    if size >= 1e12 or 0 < size < 0.9995e-3:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit:
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}"


def _path(curve: Curve, values: np.ndarray, axes: Frame, kind: str) -> str:
    words, length = [], 0  # of the piece that is being drawn
    for step, value in [*_points(curve.steps, values), (0.0, math.nan)]:
        if math.isfinite(value):
            words.append(f"{'L' if length else 'M'}{axes.x(step):.1f} {axes.y(value):.1f}")
            length += 1
            continue
        if length == 1:  # alone: a dot
            words.append("h.01")
        length = 0
    dash = _dash(curve.dash) if kind == "line" else ""
    return f'<path class="{kind}" d="{"".join(words)}" stroke="var(--c{curve.colour % 7})"{dash}/>'


def _points(steps: np.ndarray, values: np.ndarray) -> list[tuple[float, float]]:
    thin_steps, thin_values = thinned(steps, values)
    return list(zip(thin_steps.astype(float).tolist(), thin_values.tolist(), strict=True))


def _dash(number: int) -> str:
    pattern = _DASHES[number % len(_DASHES)]
    return f' stroke-dasharray="{pattern}"' if pattern else ""
