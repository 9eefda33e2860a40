"""Small data sets in every format, and a tokenizer that merges letters."""

import gzip
import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from llada_jax.data import DataConfig
from llada_jax.text import ByteTokenizer, ChatTemplate, HFTokenizer, SpecialNames

NAMES = SpecialNames(mask="<|mask|>", eos="<|endoftext|>", pad="<|endoftext|>")
ROLES = ["<|endoftext|>", "<|mask|>", "<role>", "</role>", "<|role_end|>"]


@pytest.fixture(scope="session")
def template() -> ChatTemplate:
    return ChatTemplate.llada2()


@pytest.fixture(scope="session")
def bytes_() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture(scope="session")
def hf(tmp_path_factory) -> HFTokenizer:
    return make_hf(tmp_path_factory.mktemp("hf"), [("m", "a"), ("s", "k"), ("Ġ", "ma")])


def make_hf(folder: Path, merges: list[tuple[str, str]]) -> HFTokenizer:
    """A byte-level BPE tokenizer in the released one's format."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*letters, "ma", "sk", "Ġma"])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(ROLES)
    file = folder / "tokenizer.json"
    tokenizer.save(str(file))
    return HFTokenizer(file, names=NAMES)


@pytest.fixture
def configure(tmp_path):
    """Makes a ``DataConfig`` whose cache is the test's own."""

    def make(train_path, **fields) -> DataConfig:
        fields.setdefault("cache_dir", str(tmp_path / "cache"))
        fields.setdefault("max_seq_len", 128)
        fields.setdefault("block_length", 8)
        return DataConfig(train_path=train_path, **fields)

    return make


@pytest.fixture
def write(tmp_path):
    """Writes rows as JSON lines, or a string as it is; gzipped if the name says so."""

    def write_file(name: str, content) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, str):
            content = "".join(json.dumps(row) + "\n" for row in content)
        data = content.encode("utf-8", "surrogateescape")
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return str(path)

    return write_file


def qa(number: int, length: int = 3) -> dict:
    """A question and its answer, different for every number."""
    return {"prompt": f"q{number}", "response": f"{number}:" + "x" * length}


def text_rows(count: int) -> list[dict]:
    """Texts of several lengths that carry their number."""
    return [{"text": f"<{i}>" + "t" * (7 * i % 31)} for i in range(count)]
