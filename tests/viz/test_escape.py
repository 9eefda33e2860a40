import pytest

from llada_jax.viz import escape_controls


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("你好, ñ, 👩\u200d👩", "你好, ñ, 👩\u200d👩"),
        ("a\nb\tc", "a\nb\tc"),
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("\x9b31m", "\\x9b31m"),
        ("over\rwrite\b", "over\\rwrite\\x08"),
        ("\u202eright to left", "\\u202eright to left"),
        ("line\u2028separator \ud800", "line\\u2028separator \\ud800"),
        ("\x7f\x00", "\\x7f\\x00"),
    ],
)
def test_spells_out_what_a_terminal_would_obey(text, shown):
    assert escape_controls(text) == shown


def test_keep_is_a_choice():
    assert escape_controls("a\nb", keep="") == "a\\nb"
