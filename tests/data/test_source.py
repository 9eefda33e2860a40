"""Which documents a row can hold, and what happens to the others."""

import warnings

import numpy as np
import pytest

from llada_jax.data import (
    DataError,
    DataWarning,
    FileSource,
    GeneratedSource,
    make_sources,
)
from llada_jax.tasks import TaskSource
from tests.data.conftest import qa, text_rows


@pytest.fixture
def load(configure, bytes_, template):
    def make(path, split="train", **fields):
        (source, _), *others = make_sources(
            configure(path, **fields), bytes_, template, split=split
        )
        assert not others
        return source

    return make


def texts(source, tokenizer) -> list[str]:
    return [
        tokenizer.decode(source.document(i).tokens.tolist(), skip_special_tokens=False)
        for i in range(len(source))
    ]


END = "<|endoftext|>"


def test_text_is_cut_into_pieces(load, write, bytes_):
    long = "".join(chr(ord("a") + i % 26) for i in range(40))
    rows = [{"text": t} for t in ("short", long[:16], long[:15], long[:32], long[:33], long)]
    source = load(write("a.jsonl", rows), max_seq_len=16, block_length=4)
    assert (
        texts(source, bytes_)
        == [
            "short" + END,
            long[:16],  # no room for an end, and no row for it alone
            long[:15] + END,
            long[:16],
            long[16:32],
            long[:16],
            long[16:32],
            long[32:33] + END,
            long[:16],
            long[16:32],
            long[32:] + END,
        ]
    )
    lengths = [len(source[i]["tokens"]) for i in range(len(source))]
    assert lengths == [8, 16, 16, 16, 16, 16, 16, 4, 16, 16, 12]
    assert all(source[i]["supervised"].all() for i in range(len(source)))


def test_the_fill_is_learnt(load, write, bytes_, template):
    source = load(write("a.jsonl", [qa(0, n) for n in range(17)]), block_length=8)
    for i in range(17):
        document, element = source.document(i), source[i]
        length = len(document.tokens)
        assert (element["tokens"][:length] == document.tokens).all()
        assert (element["supervised"][:length] == document.supervised).all()
        assert (element["tokens"][length:] == bytes_.eos_token_id).all()
        assert element["supervised"][length:].all()
        assert len(element["tokens"]) == length + -length % 8
        answer = 2 + i + 1  # "0:xx…", and the end of the turn
        assert element["supervised"].sum() == answer + -length % 8
    assert sorted({-len(source.document(i).tokens) % 8 for i in range(17)}) == list(range(8))


LONG = [qa(0), qa(1, 200), qa(2, 20)]


def test_long_conversations_are_left_out(load, write, bytes_):
    path = write("a.jsonl", LONG)
    with pytest.warns(DataWarning, match=r"1 of 3 documents .* max_seq_len = 128 tokens"):
        source = load(path)
    assert len(source) == 2
    assert "q2" in texts(source, bytes_)[1]


def test_long_conversations_are_errors(load, write):
    path = write("a.jsonl", LONG)
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: the conversation has 2\d\d tokens"):
        load(path, on_long="error")


def test_long_conversations_are_truncated(load, write):
    path = write("a.jsonl", LONG)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = load(path, on_long="truncate")
    assert len(source) == 3
    assert len(source[1]["tokens"]) == 128
    whole = load(path, max_seq_len=1024)[1]
    assert (source[1]["tokens"] == whole["tokens"][:128]).all()
    assert (source[1]["supervised"] == whole["supervised"][:128]).all()
    rows = [*LONG, {"prompt": "p" * 300, "response": "r"}]  # nothing to learn would be left
    path = write("b.jsonl", rows)
    with pytest.warns(DataWarning, match="1 of 4"):
        source = load(path, on_long="truncate")
    assert len(source) == 3


def test_all_too_long(load, write):
    path = write("a.jsonl", LONG)
    with pytest.raises(DataError, match=r"all 3 documents .*raise max_seq_len or set on_long"):
        load(path, max_seq_len=16)


def test_held_out_documents(load, write, bytes_):
    rows = text_rows(400)
    path = write("a.jsonl", rows)
    parts = {
        split: texts(load(path, split, validation_fraction=0.1), bytes_)
        for split in ("train", "validation")
    }
    assert sorted(parts["train"] + parts["validation"]) == sorted(row["text"] + END for row in rows)
    assert 20 < len(parts["validation"]) < 60
    more = texts(
        load(write("b.jsonl", text_rows(500)), "validation", validation_fraction=0.1), bytes_
    )
    assert set(parts["validation"]) < set(more)  # new data moves no document to the other side


def test_equal_prompts_stay_together(load, write, bytes_):
    rows = [{"prompt": f"q{i % 20}", "response": f"r{i}"} for i in range(200)]
    path = write("a.jsonl", rows)
    prompts = [
        {text.split("<role>")[2] for text in texts(load(path, s, validation_fraction=0.3), bytes_)}
        for s in ("train", "validation")
    ]
    assert len(prompts[0] | prompts[1]) == 20
    assert not prompts[0] & prompts[1]


def test_nothing_to_hold_out(load, write):
    path = write("a.jsonl", text_rows(3))
    with pytest.raises(DataError, match=r"validation_fraction = 0.0001 of the 3 documents .*none"):
        load(path, "validation", validation_fraction=0.0001)


def test_several_files(load, write, bytes_, tmp_path):
    a, b = write("set/a.jsonl", text_rows(3)), write("set/b.txt", "more")
    both = [*(row["text"] + END for row in text_rows(3)), "more" + END]
    assert texts(load([a, b]), bytes_) == both
    assert texts(load(str(tmp_path / "set")), bytes_) == both
    source = load([b, a])
    assert isinstance(source, FileSource)
    assert texts(source, bytes_) == [both[3], *both[:3]]
    with pytest.raises(IndexError):
        source[4]


def test_tasks(load, bytes_):
    source = load([{"task": "addition", "difficulty": 1}], max_seq_len=256)
    assert isinstance(source, GeneratedSource)
    assert len(source) == 2**31
    element = source[5]
    assert len(element["tokens"]) % 8 == 0
    text = bytes_.decode(element["tokens"][element["supervised"]].tolist())
    problems = TaskSource(["addition"], difficulties={"addition": 1}, seed=source._seed)
    assert text == problems[5]["messages"][1]["content"]

    held_out = load(
        [{"task": "addition", "size": 3}],
        "validation",
        max_seq_len=256,
        validation_path=[{"task": "addition", "size": 3}],
    )
    assert len(held_out) == 3


def test_bad_tasks(load):
    with pytest.raises(DataError, match=r"no task 'adition'.*did you mean 'addition'"):
        load([{"task": "adition"}])
    with pytest.raises(
        DataError, match=r"problems of task 'sudoku' are longer than max_seq_len = 64"
    ):
        load([{"task": "sudoku"}], max_seq_len=64)


@pytest.mark.parametrize("on_long", ["skip", "truncate", "error"])
def test_tasks_that_are_too_long_now_and_then(load, on_long):
    roomy = load([{"task": "addition", "difficulty": [1, 5]}], max_seq_len=512)
    lengths = np.array([len(roomy[i]["tokens"]) for i in range(32)])
    limit = int(np.median(lengths)) // 8 * 8
    source = load([{"task": "addition", "difficulty": [1, 5]}], max_seq_len=512)
    source._config = type(source._config)(
        train_path="x", max_seq_len=limit, block_length=8, on_long=on_long
    )
    if on_long == "error":
        with pytest.raises(DataError, match=r"problem \d+ has \d+ tokens, more than max_seq_len"):
            [source[i] for i in range(32)]
        return
    found = [source[i] for i in range(32)]
    long = lengths > limit
    assert long.any()
    assert not long.all()
    if on_long == "skip":
        assert [element is None for element in found] == long.tolist()
    else:
        assert [len(element["tokens"]) for element in found] == np.minimum(lengths, limit).tolist()
