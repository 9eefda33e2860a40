"""Which tokenizer a folder gives, and whether it fits the model."""

import json
import shutil

import pytest

from llada_jax.text import (
    ByteTokenizer,
    HFTokenizer,
    SentencePieceTokenizer,
    SpecialNames,
    TokenizerError,
    load_tokenizer,
)

from .conftest import GOLDEN


def write_config(folder, **entries):
    (folder / "tokenizer_config.json").write_text(json.dumps(entries), encoding="utf-8")


def test_counting():
    tokenizer = load_tokenizer(GOLDEN / "counting", mask_token_id=319, eos_token_ids=(318,))
    assert isinstance(tokenizer, HFTokenizer)
    assert (tokenizer.mask_token_id, tokenizer.pad_token_id) == (319, 318)


def test_no_tokenizer(tmp_path):
    assert load_tokenizer(tmp_path, mask_token_id=5) is None
    assert load_tokenizer(GOLDEN / "llada2.1-mini", mask_token_id=156895) is None
    with pytest.raises(TokenizerError, match="not a folder"):
        load_tokenizer(tmp_path / "missing")


def test_sentencepiece(tmp_path, spm_file, spm):
    shutil.copy(spm_file, tmp_path / "my.model")
    write_config(tmp_path, mask_token={"content": "<|mask|>"}, eos_token="<|endoftext|>")
    tokenizer = load_tokenizer(tmp_path, mask_token_id=spm.mask_token_id)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert tokenizer.mask_token_id == spm.mask_token_id
    assert tokenizer.token_text(tokenizer.eos_token_id) == "<|endoftext|>"
    shutil.copy(spm_file, tmp_path / "other.model")
    with pytest.raises(TokenizerError, match=r"my\.model, other\.model"):
        load_tokenizer(tmp_path)
    shutil.copy(spm_file, tmp_path / "tokenizer.model")
    assert load_tokenizer(tmp_path) is not None


def test_bytes(tmp_path):
    write_config(tmp_path, tokenizer_class="ByteTokenizer")
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)
    fits = load_tokenizer(tmp_path, mask_token_id=257, eos_token_ids=(256,))
    assert isinstance(fits, ByteTokenizer)
    with pytest.raises(TokenizerError, match="mask_token_id = 319"):
        load_tokenizer(tmp_path, mask_token_id=319)
    with pytest.raises(TokenizerError, match="eos_token_id is 1, 2"):
        load_tokenizer(tmp_path, eos_token_ids=(1, 2))


def test_broken_files_are_named(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path)
    write_config(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_mask_ids_must_agree():
    with pytest.raises(TokenizerError, match=r"'<\|mask\|>' has id 319.* 318 \(here '<\|endof"):
        load_tokenizer(GOLDEN / "counting", mask_token_id=318)


def test_end_ids_must_agree():
    with pytest.raises(TokenizerError, match="has id 318, but the model's eos_token_id is 7"):
        load_tokenizer(GOLDEN / "counting", eos_token_ids=(7,))
    tokenizer = load_tokenizer(GOLDEN / "counting", eos_token_ids=(7, 318))
    assert tokenizer is not None
    assert tokenizer.eos_token_id == 318


@pytest.fixture
def ling(tmp_path, byte_level_file):
    """A related model's folder: no mask token, and the mask's id is another token."""
    raw = json.loads(byte_level_file.read_text(encoding="utf-8"))
    (mask,) = (token for token in raw["added_tokens"] if token["content"] == "<|mask|>")
    mask["content"] = "<|startoftext|>"
    ids = {token["content"]: token["id"] for token in raw["added_tokens"]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    write_config(tmp_path, eos_token="<|role_end|>")
    return tmp_path, ids


def test_tokenizer_of_a_related_model(ling):
    folder, ids = ling
    with pytest.raises(TokenizerError, match=r"is '<\|role_end\|>' in this tokenizer"):
        load_tokenizer(folder, mask_token_id=ids["<|role_end|>"])
    write_config(folder, mask_token="</role>")  # who means it says so
    tokenizer = load_tokenizer(folder, mask_token_id=ids["</role>"], eos_token_ids=(3, 4))
    assert tokenizer is not None
    assert tokenizer.mask_token_id == ids["</role>"]
    assert tokenizer.eos_token_id == 3


def test_mask_beyond_the_vocabulary(ling):
    folder, _ = ling
    tokenizer = load_tokenizer(folder, mask_token_id=5000)
    assert tokenizer is not None
    assert tokenizer.mask_token_id == 5000
    assert tokenizer.token_text(5000) == "<|mask|>"
    assert tokenizer.decode(tokenizer.encode("a<|mask|>")) == "a<|mask|>"


def test_special_names(tmp_path, released_config):
    names = SpecialNames.from_folder(GOLDEN / "llada2.1-mini")
    assert names.mask == released_config["mask_token"] == "<|mask|>"
    assert names.eos == names.pad == "<|endoftext|>"
    assert names.others == ("<|startoftext|>", "[CLS]", "[gMASK]")
    assert SpecialNames.from_folder(tmp_path) == SpecialNames()
    write_config(tmp_path, mask_token=None, extra_special_tokens={"image": "<image>"})
    extra = {
        "mask_token": {"content": "[M]"},
        "additional_special_tokens": ["<a>", {"content": "<b>"}],
    }
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(extra))
    names = SpecialNames.from_folder(tmp_path)
    assert names == SpecialNames(mask="[M]", others=("<a>", "<b>", "<image>"))
