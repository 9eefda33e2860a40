from llada_jax.cli.demo import NUM_TOKENS


def test_demo_shows_three_modes(run):
    code, out, err = run("demo")
    assert (code, err) == (0, "")
    picture, table = out.split("one model, three ways")
    lines = picture.splitlines()
    for name, forwards in (("quality", 12), ("speed", 9)):
        last = f"{forwards:4d}  8,39,40,41,42,43,44,45,46,47,48,"
        assert last in lines[lines.index(name) :]
    assert "░" in picture
    assert "~" in picture  # quality mode edits one token
    rows = {
        row.split()[0]: row.split()
        for row in table.splitlines()
        if row.strip().startswith(("2.0", "quality", "speed"))
    }
    for name, forwards in (("2.0", "86"), ("quality", "12"), ("speed", "9")):
        numbers = rows[name][-5:]
        assert numbers[:2] == [str(NUM_TOKENS), forwards]
        assert numbers[2] == f"{NUM_TOKENS / int(forwards):.2f}"
    assert "v20() itself" in table
    assert "the same tokens" in " ".join(table.split())
