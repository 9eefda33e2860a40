import re

from llada_jax.cli.demo import PROBLEMS


def test_demo_shows_three_modes(run):
    code, out, err = run("demo")
    assert (code, err) == (0, "")
    picture, table = out.split("one model, three ways")
    for mode in ("0.95, no editing", "quality", "speed"):
        assert f"\n{mode}: Add " in picture
    assert "░" in picture
    rows = re.findall(r"(yes|no) +(\d+) +(\d+) +([\d.]+) +(\d+)", table)
    assert len(rows) == 3 * len(PROBLEMS)
    for _, tokens, forwards, tpf, _ in rows:
        assert tpf == f"{int(tokens) / int(forwards):.2f}"
    forwards = [int(row[2]) for row in rows]
    assert sum(forwards[2::3]) < sum(forwards[0::3])  # speed mode needs fewer than 2.0
    assert sum(row[0] == "yes" for row in rows) >= len(rows) / 3
