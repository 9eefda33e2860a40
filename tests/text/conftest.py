"""Small tokenizers of every kind: trained here, or built from nothing."""

import json
import random
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from llada_jax.text import ByteTokenizer, HFTokenizer, SentencePieceTokenizer, SpecialNames

GOLDEN = Path(__file__).parent.parent / "golden"
NAMES = SpecialNames(mask="<|mask|>", eos="<|endoftext|>", pad="<|endoftext|>")
ROLES = ["<|endoftext|>", "<|mask|>", "<role>", "</role>", "<|role_end|>"]


@pytest.fixture(scope="session")
def spm_file(tmp_path_factory) -> Path:
    """A unigram model; the role marks are user-defined, but <|role_end|> is a control piece."""
    file = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    rng = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "an", "er")]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(300)]
    sentences = [" ".join(rng.choices(words, k=8)) + "." for _ in range(400)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(file.with_suffix("")),
        vocab_size=500,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        user_defined_symbols=["<|mask|>", "<role>", "</role>"],
        control_symbols=["<|role_end|>", "<|endoftext|>"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        num_threads=1,
    )
    return file


@pytest.fixture(scope="session")
def spm(spm_file) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(spm_file, names=NAMES)


@pytest.fixture(scope="session")
def byte_level_file(tmp_path_factory) -> Path:
    """A byte-level BPE tokenizer.json like the released one, without merges but for one word."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*letters, "ma", "sk", "Ġma"])}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab, merges=[("m", "a"), ("s", "k"), ("Ġ", "ma")])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(ROLES)
    file = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    tokenizer.save(str(file))
    return file


@pytest.fixture(scope="session")
def byte_level(byte_level_file) -> HFTokenizer:
    return HFTokenizer(byte_level_file, names=NAMES)


@pytest.fixture(scope="session")
def byte_fallback(tmp_path_factory) -> HFTokenizer:
    """A tokenizer.json in Llama's style: spaces as ▁, byte tokens for everything unknown."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", *"abckms<>|你"]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            merges=[("▁", "a")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(ROLES)
    file = tmp_path_factory.mktemp("fallback") / "tokenizer.json"
    tokenizer.save(str(file))
    return HFTokenizer(file, names=NAMES)


@pytest.fixture(scope="session")
def counting() -> HFTokenizer:
    return HFTokenizer(GOLDEN / "counting" / "tokenizer.json", names=NAMES)


@pytest.fixture(params=["byte", "spm", "byte_level", "byte_fallback"], scope="session")
def tokenizer(request):
    """Every tokenizer that can write any text."""
    return ByteTokenizer() if request.param == "byte" else request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def released_config() -> dict:
    file = GOLDEN / "llada2.1-mini" / "tokenizer_config.json"
    return json.loads(file.read_text(encoding="utf-8"))
