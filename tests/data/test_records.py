"""Every format, every spelling, and what is said about rows that are neither."""

import gzip
import json

import pytest

from llada_jax.data import Conversation, DataError, RecordError, Text, as_record
from llada_jax.data.files import find_files, read_rows

PAIR = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": PAIR},
        {"messages": PAIR, "text": None, "id": 7},
        {"prompt": "Q", "response": "A"},
        {"prompt": PAIR[:1], "response": "A"},
        {"prompt": "Q", "completion": "A"},
        {"instruction": "Q", "response": "A"},
        {"instruction": "Q", "input": "", "output": "A"},
        {"question": "Q", "answer": "A"},
        {"messages": [{**m, "tool_calls": None} for m in PAIR]},
    ],
)
def test_spellings(row):
    assert as_record(row) == Conversation(PAIR)


def test_input_follows_the_instruction():
    record = as_record({"instruction": "Q", "input": "more", "output": "A"})
    assert record == Conversation([{"role": "user", "content": "Q\n\nmore"}, PAIR[1]])


def test_text():
    assert as_record({"text": "T"}) == Text("T")
    assert as_record("T") == Text("T")


def test_text_keys():
    assert as_record({"body": "T", "text": "other"}, "body") == Text("T")
    assert as_record({"turns": PAIR, "messages": []}, "turns") == Conversation(PAIR)
    with pytest.raises(
        RecordError, match=r"has no 'turns', which text_keys asks for; it has .*text"
    ):
        as_record({"text": "T"}, "turns")


def test_tools():
    assert as_record({"messages": PAIR, "tools": [{"name": "f"}]}) == Conversation(
        PAIR, [{"name": "f"}]
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (3, "is a int; make it an object with messages"),
        ({}, "has no keys, but none of the keys"),
        ({"body": "x"}, "has the keys body, but none .* text_keys"),
        ({"prompt": "Q"}, "has a 'prompt' but no 'response' or 'completion'.*add the answer"),
        ({"prompt": "Q", "response": 3}, "has a int as 'response'"),
        ({"prompt": 3, "response": "A"}, "has a int as 'prompt'"),
        ({"instruction": "Q", "input": 3, "output": "A"}, "has a int as 'input'"),
        ({"prompt": "Q", "response": " \n"}, "empty response"),
        ({"messages": PAIR[:1]}, "ends with a message of 'user'"),
        ({"messages": PAIR[1:]}, "only an answer"),
        ({"messages": []}, "'messages': messages is empty"),
        ({"messages": "hello"}, "'messages': messages must be a list"),
        ({"messages": [{"role": "human", "content": "Q"}]}, r"messages\[0\] has role 'human'; use"),
        ({"messages": [{"role": "user", "content": 3}, PAIR[1]]}, "must have a string as content"),
        ({"messages": PAIR, "tools": "f"}, "has a str as 'tools'"),
        ({"text": ""}, "'text' is empty"),
        ({"text": ["a"]}, "has a list as 'text'"),
    ],
)
def test_bad_records(row, message):
    with pytest.raises(RecordError, match=message):
        as_record(row)


def values(file) -> list:
    return [row.value for row in read_rows(find_files(file)[0])]


ROWS = [{"prompt": "ä", "response": "b"}, {"prompt": "c", "response": "d"}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "A.NDJSON"])
def test_lines(write, name):
    assert values(write(name, ROWS)) == ROWS


def test_lines_may_be_blank_and_marked(write):
    text = "\ufeff" + json.dumps(ROWS[0]) + "\n\n  \n" + json.dumps(ROWS[1])
    file = write("a.jsonl", text)
    assert values(file) == ROWS
    assert [row.place for row in read_rows(find_files(file)[0])] == ["line 1", "line 4"]


def test_one_json_list(write):
    assert values(write("a.json", json.dumps(ROWS, indent=2))) == ROWS
    rows = list(read_rows(find_files(write("b.json", "[1, 2"))[0]))
    assert rows[0].place == "line 1"
    assert rows[0].error is not None
    assert "not valid JSON" in rows[0].error


def test_parquet(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [{"messages": PAIR, "score": 1.5}, {"messages": [*PAIR, *PAIR], "score": None}]
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    assert values(file) == rows
    assert [row.place for row in read_rows(file)] == ["row 1", "row 2"]
    file.write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as Parquet"):
        values(file)


def test_parquet_needs_an_extra(tmp_path, monkeypatch):
    import sys

    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r'pip install "llada-jax\[data\]"'):
        values(tmp_path / "a.parquet")


def test_plain_text(write):
    file = find_files(write("a.txt", "one\r\ntwo\n\n\nthree\n"))[0]
    assert [row.value for row in read_rows(file)] == ["one\ntwo\n\n\nthree\n"]
    parts = [row.value for row in read_rows(file, document_separator="\n\n")]
    assert parts == ["one\ntwo", "\nthree\n"]
    assert values(write("b.txt.gz", "zipped")) == ["zipped"]
    assert values(write("c.txt", " \n")) == []


def test_bad_bytes(write):
    row = next(read_rows(find_files(write("a.jsonl", '{"text": "\udcff"}'))[0]))
    assert row.error is not None
    assert "is not UTF-8" in row.error
    row = next(read_rows(find_files(write("a.txt", "\udcff"))[0]))
    assert row.error is not None


def test_broken_gzip(tmp_path):
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"text": "x"}\n' * 999)[:-20])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz cannot be read.*complete"):
        values(file)
    file.write_bytes(b"no gzip")
    with pytest.raises(DataError, match="cannot be read"):
        values(file)


def test_finding_files(write, tmp_path):
    a, b = write("set/a.jsonl", ROWS), write("set/b.txt", "x")
    write("set/README.rst", "x")
    write("set/.hidden.jsonl", "x")
    assert [str(file) for file in find_files(tmp_path / "set")] == [a, b]
    assert [str(file) for file in find_files(tmp_path / "set" / "*.jsonl")] == [a]
    assert [str(file) for file in find_files(tmp_path / "**" / "b.*")] == [b]
    with pytest.raises(DataError, match=r"there is no data at .*none\.jsonl"):
        find_files(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"README\.rst has no format that is known; use \.jsonl"):
        find_files(tmp_path / "set" / "README.rst")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no data"):
        find_files(tmp_path / "empty")
