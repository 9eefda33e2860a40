import html.parser
import json
import re
import sys

import numpy as np
import pytest

from llada_jax.training.metrics import MetricsLog
from llada_jax.training.trackers import MetricsError
from llada_jax.viz.curves import draw_curves, read_runs
from llada_jax.viz.figures import FigureError
from llada_jax.viz.panels import build_panels, last_values, running_mean
from llada_jax.viz.svg_panel import draw_panel, frame, shown, thinned, ticks


def rows(count=80, scale=1.0):
    out = []
    for step in range(1, count + 1):
        loss = scale * (1 + 4 / step)
        train = {"loss": loss, "m2t_loss": loss, "t2t_loss": loss / 2, "keep_loss": loss / 4}
        train |= {"diffusion_term": loss, "grad_norm": 50 / step, "learning_rate": 1e-4 * step}
        train |= {"tokens_per_second": 1e4, "seconds": 0.1}
        out.append({"step": step, "split": "train", **train})
        if step % 10 == 0:
            validation = {"loss": loss, "accuracy": 0.5, "m2t_tokens": 9.0}
            out.append({"step": step, "split": "validation", **validation})
    return out


def test_panels_of_one_run():
    panels = {panel.title: panel for panel in build_panels({"run": rows()})}
    assert list(panels) == [
        "Training loss",
        "Training loss by kind of token",
        "Validation loss",
        "Gradient norm",
        "Learning rate",
        "Clean tokens / s",
        "seconds",
        "Validation: accuracy",
    ]
    parts = panels["Training loss by kind of token"]
    assert [(c.label, c.colour, c.dash) for c in parts.curves] == [
        ("M2T", 0, 0),
        ("T2T", 1, 0),
        ("keep", 2, 0),
    ]
    assert parts.legend() == list(parts.curves)
    assert panels["Training loss"].legend() == []
    assert panels["Gradient norm"].log
    assert not panels["Training loss"].log
    assert panels["Training loss"].curves[0].smooth is not None
    assert {panel.steps for panel in panels.values()} == {(0.0, 80.0)}
    assert panels["Validation loss"].curves[0].steps.tolist() == list(range(10, 81, 10))


def test_panels_of_several_runs():
    panels = build_panels({"a": rows(), "b": rows(40, scale=2.0)})
    parts = panels[1]
    assert [(c.run, c.colour, c.dash) for c in parts.curves] == [
        (run, number, dash) for number, run in enumerate("ab") for dash in range(3)
    ]
    assert parts.name(parts.curves[4]) == "b, T2T"
    assert [c.label for c in parts.legend()] == ["M2T", "T2T", "keep"]
    assert [panels[0].name(c) for c in panels[0].curves] == ["a", "b"]


def test_values_that_were_not_finite_are_gaps():
    lines = rows(5)
    lines[2]["loss"] = None
    (panel, *_) = build_panels({"run": lines})
    assert np.isnan(panel.curves[0].values).tolist() == [False, False, True, False, False]
    path = re.search(r'class="line" d="([^"]*)"', draw_panel(panel))
    assert path is not None
    assert re.sub("[0-9. ]", "", path[1]) == "MLML"
    lines[2]["loss"], lines[3]["loss"] = 1.0, None
    (panel, *_) = build_panels({"run": lines})
    assert re.search('L[0-9. ]*M[0-9. ]*h.01" stroke', draw_panel(panel))


def test_nothing_finite_can_be_drawn_too(tmp_path):
    draw_curves({"run": [{"step": 1, "split": "train", "loss": None}]}, tmp_path)


def test_running_mean():
    values = np.array([1.0, 2.0, np.nan, 4.0, np.nan, np.nan, np.nan, 5.0])
    expected = [1.5, 1.5, 3.0, 4.0, 4.0, np.nan, 5.0, 5.0]
    np.testing.assert_allclose(running_mean(values, 3), expected)
    np.testing.assert_allclose(running_mean(np.full(50, 3.0), 7), 3.0)


def test_last_values():
    last = last_values(rows(25))
    assert last["step"] == 25
    assert last["train"]["learning_rate"] == pytest.approx(25e-4)
    assert last["validation"] == {"loss": 1 + 4 / 20, "accuracy": 0.5, "m2t_tokens": 9.0}


@pytest.mark.parametrize(
    ("low", "high", "log", "expected"),
    [
        (0.0, 10.0, False, [0, 2, 4, 6, 8, 10]),
        (0.93, 1.01, False, [0.94, 0.96, 0.98, 1.0]),
        (-3e-4, 3e-4, False, [-2e-4, 0, 2e-4]),
        (1e-3, 1e3, True, [1e-3, 1e-2, 1e-1, 1, 10, 100, 1000]),
        (0.4, 40.0, True, [1, 3, 10, 30]),
        (1.0, 2.0, True, [1, 2]),
    ],
)
def test_ticks(low, high, log, expected):
    np.testing.assert_allclose(ticks(low, high, log=log), expected, atol=1e-12)


def test_shown():
    values = [0.0, 0.25, 12300.0, 2.5e-5, 1e-3, 3e-4, -4e6, 7e9, 1e13, 999.96]
    words = ["0", "0.25", "12.3k", "2.5e-5", "0.001", "3e-4", "-4M", "7G", "1e13", "1000"]
    assert [shown(value) for value in values] == words


def test_thinning_keeps_extremes_and_gaps():
    values = np.sin(np.arange(50_000) / 100)
    values[12_345], values[23_456], values[40_000] = 50, -50, np.nan
    steps, kept = thinned(np.arange(50_000), values)
    assert len(steps) < 1000
    assert {0, 12_345, 23_456, 40_000, 49_999} <= set(steps.tolist())
    np.testing.assert_array_equal(kept, values[steps])


def test_frames_of_single_points_and_constants():
    constant = [{"step": 5, "split": "train", "loss": 2.0}]
    axes = frame(build_panels({"run": constant})[0])
    assert axes.steps == (4, 6)
    assert axes.values[0] < 2 < axes.values[1]
    assert "NaN" not in draw_panel(build_panels({"run": constant})[0])


class Page(html.parser.HTMLParser):
    """Checks that tags match, and gathers attributes that could load something."""

    VOID = ("meta", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.tags = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)


def test_files(tmp_path):
    name = "</script><b>&'"
    runs = {name: rows(), "b": rows(30)}
    png, page = draw_curves(runs, tmp_path / "new" / "folder")
    assert (png.name, page.name) == ("curves.png", "curves.html")
    assert png.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    parsed = Page(text)
    assert parsed.links == []
    assert parsed.tags.count("section") == len(build_panels(runs))
    assert parsed.tags.count("script") == 2
    assert "b" not in parsed.tags
    assert not re.search(r"https?:|@import|url\(", text)
    found = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    data = json.loads(found[1])
    assert [c["name"] for c in data[0]["curves"]] == [name, "b"]
    assert data[2]["curves"][1]["steps"] == [10, 20, 30]


def test_without_matplotlib_the_page_can_still_be_made(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(FigureError, match=r'pip install "llada-jax\[viz\]".*--format html'):
        draw_curves({"run": rows(3)}, tmp_path)
    assert draw_curves({"run": rows(3)}, tmp_path, ["html"]) == [tmp_path / "curves.html"]


def test_a_run_without_lines(tmp_path):
    with pytest.raises(FigureError, match="run: nothing is logged yet"):
        draw_curves({"run": []}, tmp_path)


def test_names_of_runs(tmp_path):
    for name in ("a/sft", "b/sft", "b/dpo"):
        with MetricsLog(tmp_path / name) as log:
            log.write(1, {"loss": 1.0})
    assert list(read_runs([tmp_path / "a/sft", tmp_path / "b/dpo"])) == ["sft", "dpo"]
    assert list(read_runs([tmp_path / "a/sft", tmp_path / "b/sft"])) == ["a/sft", "b/sft"]
    assert list(read_runs([tmp_path / "b/sft/metrics.jsonl"])) == ["sft"]
    with pytest.raises(FigureError, match="given twice"):
        read_runs([tmp_path / "a/sft", tmp_path / "a/sft"])
    with pytest.raises(MetricsError, match="give the folder of a training run"):
        read_runs([tmp_path])
