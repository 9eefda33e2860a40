"""Streamed pieces, joined, are the whole."""

import hypothesis.strategies as st
from hypothesis import given

from llada_jax.text import ByteTokenizer, StreamDecoder


def pushed(tokenizer, token_ids, sizes, **options):
    """All pieces, for pushes of the given sizes in turn."""
    decoder = StreamDecoder(tokenizer, **options)
    pieces, start, turn = [], 0, 0
    while start < len(token_ids):
        size = sizes[turn % len(sizes)]
        pieces.append(decoder.push(token_ids[start : start + size]))
        start, turn = start + size, turn + 1
    return [*pieces, decoder.flush()]


sizes = st.lists(st.integers(1, 40), min_size=1, max_size=4)


@given(data=st.data(), sizes=sizes, skip=st.booleans())
def test_any_tokens(tokenizer, data, sizes, skip):
    """Random ids: mostly broken UTF-8."""
    ids = st.integers(0, tokenizer.vocab_size + 2)
    token_ids = data.draw(st.lists(ids, max_size=60)) * data.draw(st.sampled_from([1, 1, 1, 20]))
    pieces = pushed(tokenizer, token_ids, sizes, skip_special_tokens=skip)
    assert "".join(pieces) == tokenizer.decode(token_ids, skip_special_tokens=skip)


@given(data=st.data(), text=st.text(min_size=1, max_size=30), sizes=sizes)
def test_any_text(tokenizer, data, text, sizes):
    """Real text, repeated to be longer than the window, never shows half a character."""
    token_ids = tokenizer.encode(text * data.draw(st.sampled_from([1, 30])))
    pieces = pushed(tokenizer, token_ids, sizes)
    assert "".join(pieces) == tokenizer.decode(token_ids)
    if "\ufffd" not in tokenizer.decode(token_ids):
        assert "\ufffd" not in "".join(pieces)


def test_holds_back_only_what_may_change():
    decoder = StreamDecoder(ByteTokenizer())
    assert decoder.push(list("né".encode()[:2])) == "n"
    assert decoder.push(list("é".encode()[1:])) == "é"
    assert decoder.push([0xFF] * 5) == "\ufffd" * 2
    assert decoder.push([0x61]) == "\ufffd" * 3 + "a"
    assert decoder.push([0xE4]) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.push([0x62]) == "b"  # ready again


def test_words_keep_their_space(spm):
    first, second = spm.encode("da da")[:1], spm.encode("da da")[1:]
    decoder = StreamDecoder(spm)
    joined = decoder.push(first) + decoder.push(second) + decoder.flush()
    assert joined == "da da"


class Counting(ByteTokenizer):
    """Counts the tokens that are decoded."""

    decoded = 0

    def decode(self, token_ids, *, skip_special_tokens=True):
        self.decoded += len(token_ids)
        return super().decode(token_ids, skip_special_tokens=skip_special_tokens)


def test_linear_time():
    tokenizer = Counting()
    token_ids = tokenizer.encode("naïve 你好 😀 " * 200)
    pieces = pushed(tokenizer, token_ids, [1])
    assert "".join(pieces) == "naïve 你好 😀 " * 200
    assert tokenizer.decoded < 130 * len(token_ids)
