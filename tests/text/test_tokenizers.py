"""Every tokenizer: round trips, special tokens, the mask's literal, odd ids."""

import hypothesis.strategies as st
import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from tokenizers import models, normalizers, pre_tokenizers

from llada_jax.text import (
    ByteTokenizer,
    HFTokenizer,
    SentencePieceTokenizer,
    SpecialNames,
    StreamDecoder,
    Tokenizer,
    TokenizerError,
)

MARKS = ["<|mask|>", "<role>", "</role>", "<|role_end|>", "<|endoftext|>", " ", "  ", "\n", "ma"]
# sentencepiece writes a space as ▁, so the two are one to it.
plain = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=20)
with_marks = st.lists(plain | st.sampled_from(MARKS), max_size=8).map("".join)


@given(text=with_marks)
def test_round_trip(tokenizer, text):
    token_ids = tokenizer.encode(text)
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == text


@given(text=with_marks)
def test_encode_never_returns_the_mask(tokenizer, text):
    token_ids = tokenizer.encode(text)
    assert tokenizer.mask_token_id not in token_ids
    assert all(0 <= token < tokenizer.vocab_size for token in token_ids)


@given(text=plain.filter(lambda text: "<" not in text))
def test_special_tokens_are_skipped(tokenizer, text):
    token_ids = tokenizer.encode("<role>SYSTEM</role>" + text + "<|role_end|>")
    named = [t for t in token_ids if t in tokenizer.special_token_ids]
    assert [tokenizer.token_text(t) for t in named] == ["<role>", "</role>", "<|role_end|>"]
    assert tokenizer.decode(token_ids) == "SYSTEM" + text
    mask = [tokenizer.mask_token_id]
    assert tokenizer.decode(mask) == ""
    assert tokenizer.decode(mask, skip_special_tokens=False) == "<|mask|>"


def test_protocol(tokenizer):
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert {tokenizer.mask_token_id, tokenizer.eos_token_id} <= tokenizer.special_token_ids
    assert tokenizer.token_text(tokenizer.mask_token_id) == "<|mask|>"
    assert tokenizer.token_text(tokenizer.eos_token_id) == "<|endoftext|>"
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""


@given(token_ids=st.lists(st.integers(-3, 2**33), max_size=20))
def test_any_id_decodes(tokenizer, token_ids):
    inside = [token for token in token_ids if 0 <= token < tokenizer.vocab_size]
    assert tokenizer.decode(token_ids) == tokenizer.decode(inside)
    assert all(isinstance(tokenizer.token_text(token), str) for token in token_ids)


def test_token_text_of_unknown_ids(tokenizer):
    assert tokenizer.token_text(-1) == "<unused -1>"
    assert tokenizer.token_text(tokenizer.vocab_size) == f"<unused {tokenizer.vocab_size}>"


def test_surrogates(tokenizer):
    for text, expected in (
        ("a\ud83d\ude00", "a😀"),
        ("a\ud83d", "a\ufffd"),
        ("\udc00a", "\ufffda"),
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == expected


def test_wrong_bytes_do_not_spoil_their_neighbours(tokenizer):
    characters = tokenizer.encode("語")[-3:]  # three bytes
    assert tokenizer.decode([*characters, characters[0]]) == "語\ufffd"


def test_byte_ids():
    tokenizer = ByteTokenizer()
    assert tokenizer.vocab_size == 261
    assert tokenizer.encode("<role>é") == [258, 0xC3, 0xA9]
    assert tokenizer.encode("<|mask|>") == list(b"<|mask|>")
    assert tokenizer.token_text(0x61) == "a"
    assert tokenizer.token_text(0xC3) == "<0xC3>"


def test_counting_ids(counting):
    assert counting.encode("17,") == [16 + ord(c) - 32 for c in "17,"]
    assert (counting.mask_token_id, counting.eos_token_id, counting.vocab_size) == (319, 318, 320)
    assert counting.encode("1<|mask|>") == [16 + ord(c) - 32 for c in "1<|mask|>"]
    assert counting.encode("1<|endoftext|>") == [33, 318]
    assert counting.decode([33, 319, 39, 318]) == "17"
    assert counting.token_text(33) == "1"


def test_byte_level_token_text(byte_level):
    (space_ma,) = byte_level.encode(" ma")
    assert byte_level.token_text(space_ma) == " ma"
    assert [byte_level.token_text(t) for t in byte_level.encode("é")] == ["<0xC3>", "<0xA9>"]


def test_spm_spaces(spm):
    shown = [spm.token_text(token) for token in spm.encode("da<role>da da")]
    assert "".join(shown) == " da<role>da da"  # a leading space, but only where the text begins
    assert spm.decode(spm.encode("da")) == "da"
    assert [spm.token_text(t) for t in spm.encode("é")][-2:] == ["<0xC3>", "<0xA9>"]


def test_spm_names_by_default(spm_file):
    tokenizer = SentencePieceTokenizer(spm_file)
    assert tokenizer.token_text(tokenizer.mask_token_id) == "<|mask|>"
    assert tokenizer.token_text(tokenizer.eos_token_id) == "</s>"
    other = SentencePieceTokenizer(spm_file, names=SpecialNames(mask="</role>", eos="<s>"))
    assert other.token_text(other.mask_token_id) == "</role>"
    assert other.mask_token_id not in other.encode("a</role>b")
    assert other.decode(other.encode("a</role>b")) == "a</role>b"
    assert other.token_text(other.eos_token_id) == "<s>"


def test_spm_that_normalizes(tmp_path):
    """Sentencepiece's default training: BPE here, NFKC, spaces collapsed, no byte fallback."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["abba ba mask", "< | > ab", "sa ma ka"] * 9),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=40,
        hard_vocab_limit=False,
        user_defined_symbols=["<|mask|>", "<role>"],
        minloglevel=2,
    )
    tokenizer = SentencePieceTokenizer(tmp_path / "tokenizer.model")
    for text in ("ab<|mask|>ba", "ab＜｜ｍask｜＞ba"):
        assert tokenizer.mask_token_id not in tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == "ab<|mask|>ba"
    assert tokenizer.decode(tokenizer.encode(" ab  ba ")) == "ab ba"
    inside = tokenizer.encode("<role> ab  ba ")
    assert tokenizer.decode(inside, skip_special_tokens=False) == "<role> ab  ba "
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push([token]) for token in tokenizer.encode("ab ba 語 ma" * 40)]
    assert "".join(pieces) == tokenizer.decode(tokenizer.encode("ab ba 語 ma" * 40))


def test_mask_made_by_a_normalizer(tmp_path):
    """Full-width brackets become the mask's name only inside the tokenizer."""
    tokenizer = tokenizers.Tokenizer(
        models.WordLevel({c: i for i, c in enumerate("<|mask>?")}, "?")
    )
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    mask = tokenizers.AddedToken("<|mask|>", normalized=True, special=True)
    tokenizer.add_special_tokens([mask])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("＜｜mask｜＞").tokens == ["<|mask|>"]  # the danger
    ours = HFTokenizer(tmp_path / "tokenizer.json")
    assert ours.encode("＜｜mask｜＞") == [tokenizer.token_to_id(c) for c in "<|mask|>"]


def test_mask_with_no_other_spelling(tmp_path):
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"a": 0, "▢": 1}, "a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = HFTokenizer(tmp_path / "tokenizer.json", names=SpecialNames(mask="▢"))
    assert ours.encode("a▢a") == [0, 0]


def test_no_truncation_or_padding(tmp_path, byte_level_file):
    tokenizer = tokenizers.Tokenizer.from_file(str(byte_level_file))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(HFTokenizer(tmp_path / "tokenizer.json").encode("abcdef")) == 6


def test_names_of_plain_vocabulary_entries_become_special(tmp_path):
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<end>": 1, "?": 2}, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = HFTokenizer(tmp_path / "tokenizer.json", names=SpecialNames(eos="<end>"))
    assert ours.encode("a<end>") == [0, 1]
    assert ours.eos_token_id == 1
    assert ours.mask_token_id is None


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"\xff\xfe"])
def test_broken_files(tmp_path, content):
    for kind, name in ((HFTokenizer, "tokenizer.json"), (SentencePieceTokenizer, "t.model")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TokenizerError, match=name):
            kind(tmp_path / name)
        with pytest.raises(TokenizerError, match="missing"):
            kind(tmp_path / "missing")
