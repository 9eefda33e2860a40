import pytest

from llada_jax.viz.figures import FigureError
from llada_jax.viz.tradeoff import plot_tradeoff


def points(spread=0.01):
    return [
        {
            "variant": variant,
            "editing": editing,
            "threshold": threshold,
            "accuracy": 0.9 * threshold**0.2 + 0.02 * editing,
            "accuracy_std": spread,
            "tokens_per_forward": 6 - 4 * threshold + editing,
            "tokens_per_forward_std": 10 * spread,
        }
        for variant in ("plain", "own drafts")
        for editing in (False, True)
        for threshold in (0.95, 0.5, 0.7)
    ]


def test_both_files(tmp_path):
    png, svg = plot_tradeoff(points(), tmp_path / "docs" / "tradeoff-v2.1", title="Title here")
    assert (png.name, svg.name) == ("tradeoff-v2.1.png", "tradeoff-v2.1.svg")
    assert png.read_bytes().startswith(b"\x89PNG")
    text = svg.read_text()
    for word in ("Title here", "plain", "own drafts", "editing on", "editing off", "accuracy"):
        assert f">{word}</text>" in text
    assert "spread over seeds" in text
    for threshold in (0.95, 0.5, 0.7):
        assert text.count(f">{threshold}</text>") >= 4


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_one_file(tmp_path, ending):
    file = tmp_path / f"t.{ending}"
    assert plot_tradeoff(points(0.0)[:1], file) == [file]
    assert [f.name for f in tmp_path.iterdir()] == [file.name]


def test_the_same_points_give_the_same_svg(tmp_path):
    files = [plot_tradeoff(points(), tmp_path / f"{i}.svg")[0] for i in range(2)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_spread_is_optional(tmp_path):
    bare = [
        {k: p[k] for k in ("variant", "editing", "threshold", "accuracy", "tokens_per_forward")}
        for p in points()
    ]
    (file,) = plot_tradeoff(bare, tmp_path / "t.svg", accuracy_label="solved")
    assert "spread over seeds" not in file.read_text()
    assert ">solved</text>" in file.read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accuracy": None}, "point 0 lacks accuracy"),
        ({"threshold": None, "editing": None}, "point 0 lacks editing, threshold"),
        ({"accuracy": float("nan")}, "point 0 holds a value that is not finite"),
    ],
)
def test_incomplete_points(tmp_path, change, message):
    with pytest.raises(FigureError, match=message):
        plot_tradeoff([points()[0] | change], tmp_path / "t.png")
    with pytest.raises(FigureError, match="no points"):
        plot_tradeoff([], tmp_path / "t.png")
