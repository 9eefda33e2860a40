"""Tokenised once; again if anything that matters has changed."""

import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest

from llada_jax.data import DataError, DataWarning, Document, DocumentTokenizer, make_sources
from llada_jax.data import ingest as ingest_module
from llada_jax.data.cache import TokenFile, TokenWriter, cache_folder, is_complete
from llada_jax.data.fingerprint import template_fingerprint, tokenizer_fingerprint
from llada_jax.data.ingest import tokenized_files
from llada_jax.text import ByteTokenizer, ChatTemplate
from tests.data.conftest import make_hf, qa, text_rows


@pytest.fixture
def ingest(bytes_, template, configure, monkeypatch):
    """Runs ``tokenized_files``; the result carries how many records were tokenised."""
    count = [0]
    tokenize_record = DocumentTokenizer.__call__

    def counting(self, record):
        count[0] += 1
        return tokenize_record(self, record)

    monkeypatch.setattr(DocumentTokenizer, "__call__", counting)

    def run(path, tokenizer=bytes_, template=template, last_turn_only=True, **fields):
        count[0] = 0
        tokenize = DocumentTokenizer(tokenizer, template, last_turn_only)
        files = tokenized_files(path, configure(path, **fields), tokenize)
        return files, count[0]

    return run


def contents(files: list[TokenFile]) -> list[tuple]:
    documents = [file.read(i) for file in files for i in range(len(file))]
    return [(d.tokens.tolist(), d.spans, d.is_text) for d in documents]


def test_the_second_run_reads_the_cache(write, ingest, bytes_, template):
    rows = [*map(qa, range(5)), *text_rows(5)]
    path = write("a.jsonl", rows)
    first, tokenized = ingest(path)
    assert tokenized == 10
    again, tokenized = ingest(path)
    assert tokenized == 0
    assert contents(again) == contents(first)
    assert [file.file for file in again] == [Path(path)]

    tokenize = DocumentTokenizer(bytes_, template)
    from llada_jax.data import as_record

    direct = [tokenize(as_record(row)) for row in rows]
    assert contents(again) == [(d.tokens.tolist(), d.spans, d.is_text) for d in direct]


def test_a_copy_of_the_file_has_the_same_entry(write, ingest):
    ingest(write("a.jsonl", text_rows(3)))
    _, tokenized = ingest(write("other/b.jsonl", text_rows(3)))
    assert tokenized == 0


def test_what_invalidates_it(write, ingest, tmp_path, bytes_):
    path = write("a.jsonl", [qa(0), {"text": "a mask"}])
    seen = []

    def fresh(**options) -> bool:
        files, tokenized = ingest(path, **options)
        seen.append(contents(files))
        return tokenized > 0

    assert fresh()
    assert not fresh(packing=False, max_seq_len=64, block_length=4, shuffle_seed=3)
    assert fresh(last_turn_only=False)
    assert fresh(document_separator="\n\n")
    assert fresh(template=ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}"))
    folders = [tmp_path / name for name in "xy"]
    for folder in folders:
        folder.mkdir()
    merges = [("m", "a"), ("s", "k"), ("Ġ", "ma")]
    assert fresh(tokenizer=make_hf(folders[0], merges))
    with_merges = seen[-1]
    assert fresh(tokenizer=make_hf(folders[1], merges[:1]))  # the same vocabulary
    assert seen[-1] != with_merges
    assert not fresh()
    write("a.jsonl", [qa(1), {"text": "a mask"}])
    assert fresh()
    assert seen[-1] != seen[0]


def test_a_broken_entry_is_written_again(write, ingest):
    path = write("a.jsonl", text_rows(4))
    (file,), _ = ingest(path)
    before = contents([file])
    with (file.folder / "tokens.bin").open("ab") as stream:
        stream.truncate(4)
    again, tokenized = ingest(path)
    assert tokenized == 4
    assert contents(again) == before
    assert [p.name for p in file.folder.parent.iterdir()] == [file.folder.name]


def test_nothing_stays_after_an_error(write, ingest, tmp_path):
    path = write("a.jsonl", [*text_rows(4), {"text": ""}])
    with pytest.raises(DataError):
        ingest(path)
    assert not list((tmp_path / "cache").iterdir())


def test_another_process_may_be_faster(tmp_path):
    document = Document(np.arange(5, dtype=np.int32), ((2, 5),), is_text=False)
    writers = [TokenWriter(tmp_path / "entry") for _ in range(2)]
    for writer in writers:
        writer.add(document, 1)
        writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]
    assert contents([TokenFile(tmp_path / "entry", Path("x"))]) == [
        ([0, 1, 2, 3, 4], ((2, 5),), False)
    ]


def test_parts_of_a_document(tmp_path):
    writer = TokenWriter(tmp_path / "entry")
    writer.add(Document(np.arange(9, dtype=np.int32), ((0, 9),), is_text=True), 1)
    writer.add(Document(np.arange(9, dtype=np.int32), ((1, 3), (6, 9)), is_text=False), 2)
    writer.finish()
    file = TokenFile(tmp_path / "entry", Path("x"))
    part = file.read(1, 2, 7)
    assert part.tokens.tolist() == [2, 3, 4, 5, 6]
    assert part.spans == ((0, 1), (4, 5))
    assert file.read(1, 3, 6).spans == ()
    assert contents([pickle.loads(pickle.dumps(file))]) == contents([file])
    assert len(pickle.dumps(file)) < 1000


def test_only_complete_entries_count(tmp_path):
    assert not is_complete(tmp_path / "none")
    (tmp_path / "meta.json").write_text("{}")
    assert not is_complete(tmp_path)


def test_bad_rows_name_file_and_line(write, ingest):
    path = write("bad.jsonl", '{"text": "a"}\n\n{"text": \n')
    with pytest.raises(DataError, match=r"bad\.jsonl, line 3: is not valid JSON"):
        ingest(path)
    path = write("chat.jsonl", [qa(0), {"prompt": "q", "response": ""}])
    with pytest.raises(DataError, match=r"chat\.jsonl, line 2: has an empty response"):
        ingest(path)


def test_bad_rows_can_be_skipped(write, ingest):
    rows = ['{"text": "good"}', "{", "[]", '{"text": 3}', "7", '{"no": 1}', "}", '{"text": "x"}']
    path = write("a.jsonl", "\n".join(rows))
    for _ in range(2):  # the cache remembers
        with pytest.warns(DataWarning, match=r"6 of 8 rows are bad .*line 2: is not.*; …") as told:
            (file,), _ = ingest(path, on_bad_row="skip")
        assert len(told) == 1
        assert len(file) == 2
        assert file.numbers.tolist() == [1, 8]
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: is not valid JSON"):
        ingest(path, on_bad_row="error")


def test_no_documents(write, configure, bytes_, template):
    for content in ("", "\n\n"):
        config = configure(write("none.jsonl", content))
        with pytest.raises(DataError, match=r"none\.jsonl holds no documents; give"):
            make_sources(config, bytes_, template, split="train")
    config = configure(write("bad.jsonl", "{}\n{}\n"), on_bad_row="skip")
    with (
        pytest.warns(DataWarning),
        pytest.raises(DataError, match=r"bad\.jsonl holds no documents; all 2 rows are bad"),
    ):
        make_sources(config, bytes_, template, split="train")


def test_the_bar_is_for_large_files(write, ingest, monkeypatch, capsys):
    ingest(write("a.jsonl", text_rows(300)))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(ingest_module, "_QUIET", 1)
    ingest(write("b.jsonl", text_rows(301)))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "tokenising b.jsonl" in captured.err


def test_where_the_cache_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / "llada_jax" / "tokens"
    assert cache_folder(str(tmp_path / "x" / "y")) == tmp_path / "x" / "y"
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cache_dir = .*file.* cannot be written"):
        cache_folder(str(tmp_path / "file" / "below"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache_folder(None).name == f"llada_jax_tokens_{os.getuid()}"


def test_fingerprints(bytes_, template):
    class Other(ByteTokenizer):
        eos_token_id = 5

    assert tokenizer_fingerprint(bytes_) == tokenizer_fingerprint(ByteTokenizer())
    assert tokenizer_fingerprint(bytes_) != tokenizer_fingerprint(Other())
    assert template_fingerprint(template) == template_fingerprint(ChatTemplate.llada2())
    assert template_fingerprint(None) != template_fingerprint(template)


def test_warnings_are_one_line():
    from llada_jax.data.errors import warn

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        warn("three rows are missing")
    shown = warnings.formatwarning(told[0].message, told[0].category, told[0].filename, 0)
    assert shown == "llada_jax.data:0: DataWarning: three rows are missing\n"
