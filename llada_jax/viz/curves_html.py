"""Training curves as one HTML file: inline SVG, nothing from the network, light or dark."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from llada_jax.viz import svg_panel
from llada_jax.viz.figures import COLOURS, DARK_COLOURS
from llada_jax.viz.panels import Panel, last_values

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def curves_page(panels: Sequence[Panel], runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The page.

    Args:
      panels: what ``build_panels`` made of ``runs``.
      runs: lines of ``read_metrics`` by the run's name.
    """
    title = html.escape(" · ".join(runs))
    data = json.dumps([_hover_data(panel) for panel in panels], separators=(",", ":"))
    data = data.replace("<", "\\u003c")
    smooth = any(curve.smooth is not None for panel in panels for curve in panel.curves)
    note = "Thin lines are what was logged, thick ones a running mean." if smooth else ""
    cards = "\n".join(_card(panel, number, len(runs)) for number, panel in enumerate(panels))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{title}</title>
<style>
:root {{ {_variables(COLOURS)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK_COLOURS)} }} }}
{_STYLE}</style>
</head>
<body>
{_heading(runs)}
<p class="note">{note}</p>
<main>
{cards}
</main>
<details><summary>Last values</summary>{_table(runs)}</details>
<script type="application/json" id="data">{data}</script>
<script>
{_SCRIPT}</script>
</body>
</html>
"""


def _heading(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The runs, with their colours if there are several."""
    steps = {html.escape(name): last_values(rows)["step"] for name, rows in runs.items()}
    words = [f"{name} <small>{step} steps</small>" for name, step in steps.items()]
    if len(words) == 1:
        return f"<h1>{words[0]}</h1>"
    keys = (f"<span>{svg_panel.swatch(i)}{word}</span>" for i, word in enumerate(words))
    return f'<h1 class="legend">{"".join(keys)}</h1>'


def _card(panel: Panel, number: int, num_runs: int) -> str:
    legend = "".join(
        f"<span>{svg_panel.swatch(curve.colour if num_runs == 1 else None, curve.dash)}"
        f"{html.escape(curve.label)}</span>"
        for curve in panel.legend()
    )
    scale = " <small>logarithmic</small>" if panel.log else ""
    return (
        f'<section data-panel="{number}"><h2>{html.escape(panel.title)}{scale}</h2>'
        f'<div class="legend">{legend}</div>{svg_panel.draw_panel(panel)}'
        '<div class="tip" hidden></div></section>'
    )


def _hover_data(panel: Panel) -> dict[str, Any]:
    axes = svg_panel.frame(panel)
    curves = []
    for curve in panel.curves:
        steps, values = svg_panel.thinned(curve.steps, curve.line)
        curves.append(
            {
                "name": panel.name(curve),
                "colour": curve.colour % 7,
                "steps": [int(step) for step in steps],
                "values": [float(f"{v:.5g}") if math.isfinite(v) else None for v in values],
            }
        )
    return {"x": axes.steps, "curves": curves}


def _table(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    last = {name: last_values(rows) for name, rows in runs.items()}
    metrics = {
        (split, metric): None
        for values in last.values()
        for split in values
        if split != "step"
        for metric in values[split]
    }
    head = "".join(f"<th>{html.escape(name)}</th>" for name in last)
    rows = []
    for split, metric in metrics:
        cells = (values.get(split, {}).get(metric, "") for values in last.values())
        text = "".join(f"<td>{_cell(cell)}</td>" for cell in cells)
        rows.append(f"<tr><th>{html.escape(split)}: {html.escape(metric)}</th>{text}</tr>")
    return f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"


def _cell(value: Any) -> str:
    if value is None:
        return "not finite"
    return value if isinstance(value, str) else f"{value:.5g}"


def _variables(colours: Sequence[str]) -> str:
    return " ".join(f"--c{i}: {c};" for i, c in enumerate(colours))


_STYLE = """\
:root { color-scheme: light dark; --back: #fff; --card: #fff; --ink: #222; --soft: #666;
  --edge: #ddd; }
@media (prefers-color-scheme: dark) { :root { --back: #15171a; --card: #1d2024; --ink: #e6e6e6;
  --soft: #9aa0a6; --edge: #363a40; } }
body { margin: 1.5rem; background: var(--back); color: var(--ink);
  font: 14px/1.4 system-ui, sans-serif; }
h1, h1.legend { font-size: 1.15rem; margin: 0; overflow-wrap: anywhere; color: var(--ink); }
h1.legend { font-weight: bold; }
h2 { font-size: .95rem; margin: 0; }
small, .note, .legend { color: var(--soft); font-weight: normal; }
.note { margin: .2rem 0 1rem; }
main { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); }
section { position: relative; background: var(--card); border: 1px solid var(--edge);
  border-radius: 8px; padding: .7rem .8rem .3rem; display: flex; flex-direction: column; }
.legend { font-size: .8rem; min-height: 1.3em; display: flex; flex-wrap: wrap; column-gap: .9rem; }
.legend span { display: inline-flex; align-items: center; gap: .3rem; }
.swatch { width: 1.6rem; height: .5rem; }
section > svg { display: block; width: 100%; margin-top: auto; touch-action: pan-y; }
svg text { font-size: 11px; fill: var(--soft); }
.end { text-anchor: end; }
.mid { text-anchor: middle; }
svg path { fill: none; vector-effect: non-scaling-stroke; }
.grid { stroke: var(--edge); stroke-width: .6; }
.axis { stroke: var(--soft); }
.line { stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.raw { stroke-width: .8; opacity: .3; stroke-linecap: round; }
.cursor { stroke: var(--soft); stroke-width: 1; visibility: hidden; }
.tip { position: absolute; pointer-events: none; background: var(--card); color: var(--ink);
  border: 1px solid var(--edge); border-radius: 5px; padding: .2rem .5rem; font-size: .8rem;
  white-space: nowrap; font-variant-numeric: tabular-nums; z-index: 1; }
details { margin-top: 1.2rem; }
summary { cursor: pointer; }
table { border-collapse: collapse; margin-top: .5rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .15rem 1.2rem .15rem 0; font-weight: normal; }
td { text-align: right; }
tr { border-bottom: 1px solid var(--edge); }
"""

_SCRIPT = (
    f"""\
const PANELS = JSON.parse(document.getElementById("data").textContent);
const [WIDTH, LEFT, RIGHT] = [{svg_panel.WIDTH}, {svg_panel.LEFT}, {svg_panel.RIGHT}];"""
    + """
for (const section of document.querySelectorAll("section")) {
  const panel = PANELS[section.dataset.panel];
  const svg = section.querySelector(":scope > svg");
  const cursor = svg.querySelector(".cursor");
  const tip = section.querySelector(".tip");
  const nearest = (steps, step) => {
    let low = 0, high = steps.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle; else high = middle;
    }
    return step - steps[low] < steps[high] - step ? low : high;
  };
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    const share = ((event.clientX - box.left) / box.width * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT);
    const step = panel.x[0] + Math.min(1, Math.max(0, share)) * (panel.x[1] - panel.x[0]);
    let at = null;
    for (const curve of panel.curves) {
      const found = curve.steps[nearest(curve.steps, step)];
      if (at === null || Math.abs(found - step) < Math.abs(at - step)) at = found;
    }
    const x = LEFT + (at - panel.x[0]) / (panel.x[1] - panel.x[0]) * (WIDTH - LEFT - RIGHT);
    cursor.setAttribute("transform", `translate(${x})`);
    cursor.style.visibility = "visible";
    tip.replaceChildren(`step ${at}`);
    for (const curve of panel.curves) {
      if (at < curve.steps[0] || at > curve.steps[curve.steps.length - 1]) continue;
      const i = nearest(curve.steps, at);
      const line = document.createElement("div");
      const name = document.createElement("span");
      name.textContent = "\\u25cf ";
      name.style.color = `var(--c${curve.colour})`;
      line.append(name, `${curve.name} ${curve.values[i] ?? "not finite"}`);
      tip.append(line);
    }
    tip.hidden = false;
    const outer = section.getBoundingClientRect();
    const place = x / WIDTH * box.width + box.left - outer.left;
    const left = place + 14 + tip.offsetWidth > section.clientWidth;
    tip.style.left = `${left ? Math.max(0, place - 14 - tip.offsetWidth) : place + 14}px`;
    tip.style.top = `${box.top - outer.top + 6}px`;
  });
  svg.addEventListener("pointerleave", () => {
    tip.hidden = true;
    cursor.style.visibility = "hidden";
  });
}
"""
)
