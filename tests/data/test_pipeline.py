"""Batches: shared, mixed, repeated, and resumed exactly."""

import itertools
import json
import subprocess
import sys
import textwrap
from collections import Counter

import numpy as np
import pytest

from llada_jax.config import ConfigError
from llada_jax.data import DataError, make_batches, unpack
from tests.data.conftest import qa, text_rows


@pytest.fixture
def open_batches(configure, bytes_, template):
    """``make_batches`` with small rows; iterators are closed at the end."""
    opened = []

    def make(path, batch_size=4, split="train", **fields):
        names = ("process_index", "process_count", "seed")
        options = {name: fields.pop(name) for name in names if name in fields}
        batches = make_batches(
            configure(path, **fields),
            bytes_,
            template,
            batch_size=batch_size,
            split=split,
            **options,
        )
        opened.append(batches)
        return batches

    yield make
    for batches in opened:
        batches.close()


def documents(batches) -> list[bytes]:
    """The documents of batches as bytes, without their end."""
    return [
        bytes(tokens[tokens < 256].astype(np.uint8)) for b in batches for tokens, _ in unpack(b)
    ]


def numbers(batches) -> list[int]:
    """Which of ``text_rows`` a batch holds."""
    return [int(text[1 : text.index(b">")]) for text in documents(batches)]


def equal(left, right) -> bool:
    return all((a[key] == b[key]).all() for a, b in zip(left, right, strict=True) for key in a)


def take(batches, count) -> list:
    return list(itertools.islice(batches, count))


def test_every_document_once_an_epoch(write, open_batches):
    batches = open_batches(write("a.jsonl", text_rows(50)), max_seq_len=64)
    seen = numbers(take(batches, 100))
    assert len(seen) > 200
    assert sorted(seen[:50]) != seen[:50]
    counts = Counter(seen)  # packing moves a document from one epoch's end to the next one's
    assert len(counts) == 50
    assert max(counts.values()) - min(counts.values()) <= 6


def test_every_epoch_has_its_order(write, open_batches):
    batches = open_batches(
        write("a.jsonl", text_rows(24)), packing=False, batch_size=8, max_seq_len=64
    )
    epochs = [numbers(take(batches, 3)) for _ in range(3)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_seeds(write, open_batches):
    path = write("a.jsonl", text_rows(50))
    first = take(open_batches(path), 4)
    assert equal(first, take(open_batches(path), 4))
    assert equal(first, take(open_batches(path, seed=0), 4))
    assert not equal(first, take(open_batches(path, seed=1), 4))
    assert equal(take(open_batches(path, seed=1), 4), take(open_batches(path, shuffle_seed=1), 4))


CASES = {
    "packed": {},
    "one a row": {"packing": False},
    "random length": {"random_length": 0.5},
    "validation": {"split": "validation", "validation_fraction": 0.5},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("taken", [0, 1, 17])
def test_exact_resume(write, open_batches, case, taken):
    rows = [*text_rows(300), *map(qa, range(300))]
    path = write("a.jsonl", rows)
    batches = open_batches(path, **CASES[case])
    take(batches, taken)
    state = json.loads(json.dumps(batches.get_state()))
    expected = take(batches, 60)  # several packing buffers, two epochs of training data
    restored = open_batches(path, **CASES[case])
    take(restored, 3)
    for _ in range(2):
        restored.set_state(state)
        assert restored.get_state() == state
        assert equal(take(restored, 60), expected)
    batches.set_state(state)
    assert equal(take(batches, 60), expected)


def test_resume_of_a_mixture(write, open_batches):
    mixture = [
        {"path": write("a.jsonl", text_rows(30)), "weight": 2},
        {"task": "addition", "difficulty": 1},
    ]
    batches = open_batches(mixture, max_seq_len=256)
    take(batches, 15)
    state = json.loads(json.dumps(batches.get_state()))
    expected = take(batches, 15)
    restored = open_batches(mixture, max_seq_len=256)
    restored.set_state(state)
    assert equal(take(restored, 15), expected)


def test_resume_with_other_batch_sizes(write, open_batches):
    path = write("a.jsonl", text_rows(100))
    batches = open_batches(path, batch_size=4)
    take(batches, 5)
    state = batches.get_state()
    expected = take(batches, 6)
    restored = open_batches(path, batch_size=6)
    restored.set_state(state)
    rows = [np.concatenate([b["tokens"] for b in part]) for part in (expected, take(restored, 4))]
    assert (rows[0] == rows[1]).all()


def test_resume_needs_the_same_data(write, open_batches):
    state = open_batches(write("a.jsonl", text_rows(20))).get_state()
    others = open_batches(write("b.jsonl", text_rows(21)))
    with pytest.raises(DataError, match=r"changed: documents\. Restore them, or start the data an"):
        others.set_state(state)
    shorter = open_batches(write("a.jsonl", text_rows(20)), max_seq_len=64, seed=3)
    with pytest.raises(
        DataError, match=r"changed: max_seq_len \(was 128, is 64\), seed \(was 0, is 3\)\."
    ):
        shorter.set_state(state)
    with pytest.raises(DataError, match="changed"):
        others.set_state({})


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_processes_share_an_epoch(write, open_batches, count, packing):
    path = write("a.jsonl", text_rows(60))
    parts = []
    for index in range(count):
        batches = open_batches(
            path,
            batch_size=6,
            process_index=index,
            process_count=count,
            packing=packing,
            max_seq_len=40,
        )
        part = take(batches, 60)
        assert all(batch["tokens"].shape == (6 // count, 40) for batch in part)
        parts.append(numbers(part))
    if packing:
        return  # rows are shuffled, so an epoch's end is not sharp
    shares = [set(part[: 60 // count]) for part in parts]
    assert sum(map(len, shares)) == 60
    assert set().union(*shares) == set(range(60))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_validation_comes_once(write, open_batches, count, packing):
    train, path = write("t.jsonl", text_rows(5)), write("v.jsonl", text_rows(61))
    parts = [
        list(
            open_batches(
                train,
                batch_size=8,
                split="validation",
                validation_path=path,
                process_index=index,
                process_count=count,
                packing=packing,
                max_seq_len=64,
            )
        )
        for index in range(count)
    ]
    assert len({len(part) for part in parts}) == 1
    assert all(b["tokens"].shape == (8 // count, 64) for part in parts for b in part)
    assert sorted(number for part in parts for number in numbers(part)) == list(range(61))
    whole = [
        {key: np.concatenate([part[i][key] for part in parts]) for key in parts[0][0]}
        for i in range(len(parts[0]))
    ]
    if count > 1:
        alone = open_batches(
            train,
            batch_size=8,
            split="validation",
            validation_path=path,
            packing=packing,
            max_seq_len=64,
        )
        assert equal(whole, list(alone))
    last = whole[-1]
    empty = last["document"].max(axis=1) == 0
    assert not last["supervised"][empty].any()


def test_validation_can_be_repeated(write, open_batches):
    path = write("a.jsonl", text_rows(20))
    batches = open_batches(path, split="validation", validation_path=path)
    state = batches.get_state()
    first = list(batches)
    assert list(batches) == []
    batches.set_state(state)
    assert equal(first, list(batches))


def test_batches_must_be_shared_evenly(write, open_batches):
    path = write("a.jsonl", text_rows(5))
    with pytest.raises(
        ConfigError, match=r"batch_size = 6 is not a multiple of the 4 .*use 4 or 8"
    ):
        open_batches(path, batch_size=6, process_count=4)
    with pytest.raises(ConfigError, match=r"batch_size = 1 is not .*use 2$"):
        open_batches(path, batch_size=1, process_count=2)
    with pytest.raises(ConfigError, match="process_index = 2 must be from 0 to 1"):
        open_batches(path, process_index=2, process_count=2)
    with pytest.raises(DataError, match=r"5 documents.* cannot be shared by 8 processes"):
        open_batches(path, batch_size=8, process_count=8)


def test_weights(write, open_batches):
    mixture = [
        {"path": write("a.jsonl", text_rows(40)), "weight": 3},
        {"path": write("b.jsonl", [{"text": f"{{{i}}}"} for i in range(7)]), "weight": 1},
    ]
    batches = open_batches(mixture, packing=False, batch_size=40)
    found = documents(take(batches, 10))
    assert Counter(text[:1] for text in found) == {b"<": 300, b"{": 100}
    natural = open_batches([entry["path"] for entry in mixture], packing=False, batch_size=47)
    found = documents(take(natural, 10))
    assert Counter(text[:1] for text in found) == {b"<": 400, b"{": 70}


def test_tasks_do_not_repeat(open_batches):
    batches = open_batches({"task": "arithmetic"}, max_seq_len=256, batch_size=8)
    found = documents(take(batches, 20))
    assert len(set(found)) > 0.98 * len(found)
    other = open_batches({"task": "arithmetic"}, max_seq_len=256, batch_size=8, seed=1)
    assert len(set(documents(take(other, 20))) & set(found)) < 0.02 * len(found)


def test_task_validation(open_batches):
    task = {"task": "addition", "difficulty": 1, "size": 20}
    batches = open_batches(
        {"task": "addition", "difficulty": 1},
        split="validation",
        validation_path=[task, {"task": "arithmetic", "size": 5, "difficulty": 1}],
        max_seq_len=256,
    )
    assert len(documents(batches)) == 25


def test_supervised_tokens(write, open_batches, bytes_):
    batches = open_batches(write("a.jsonl", [qa(i, i % 9) for i in range(40)]), max_seq_len=256)
    for batch in take(batches, 5):
        for tokens, supervised in unpack(batch):
            text = bytes_.decode(tokens[supervised].tolist(), skip_special_tokens=False)
            answer, _, fill = text.partition("<|role_end|>")
            number, _, tail = answer.partition(":")
            assert tail == "x" * (int(number) % 9)
            assert fill == "<|endoftext|>" * fill.count("<|endoftext|>")
            assert fill.count("<|endoftext|>") < 8
            prompt = bytes_.decode(tokens[~supervised].tolist(), skip_special_tokens=False)
            assert prompt.endswith(f"q{number}<|role_end|><role>ASSISTANT</role>")


def test_a_closed_iterator_says_so(write, open_batches):
    batches = open_batches(write("a.jsonl", text_rows(5)))
    next(batches)
    batches.close()
    batches.close()
    with pytest.raises(ValueError, match="closed"):
        next(batches)


def test_errors_reach_the_reader(open_batches, monkeypatch):
    batches = open_batches({"task": "addition"}, max_seq_len=256)
    from llada_jax.data.source import GeneratedSource

    def fail(self, index):
        raise DataError("no more")

    monkeypatch.setattr(GeneratedSource, "__getitem__", fail)
    with pytest.raises(DataError, match="no more"):
        take(batches, 1000)


SCRIPT = """
    import json, sys
    from llada_jax.data import DataConfig, make_batches, unpack
    from llada_jax.text import ByteTokenizer

    def main():
        config = DataConfig(
            train_path=sys.argv[1], cache_dir=sys.argv[2], max_seq_len=64, block_length=8,
            num_workers=int(sys.argv[3]),
        )
        make = lambda: make_batches(config, ByteTokenizer(), None, batch_size=4, split="train")
        batches = make()
        for _ in range(3):
            next(batches)
        state = batches.get_state()
        expected = [next(batches)["tokens"].tolist() for _ in range(6)]
        again = make()
        again.set_state(json.loads(json.dumps(state)))
        assert [next(again)["tokens"].tolist() for _ in range(6)] == expected
        print("same")

    if __name__ == "__main__":
        main()
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_a_quiet_end(write, tmp_path, workers):
    """In a process of its own: nothing is closed by hand, and Python still ends in silence."""
    path = write("a.jsonl", text_rows(100))
    script = tmp_path / "read.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, str(script), path, str(tmp_path / "cache"), str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "same\n"
    assert "Exception" not in done.stderr
    assert "Traceback" not in done.stderr
