"""A tokenizer trained here, read back by the loaders that read released ones."""

import shutil

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

from llada_jax.tasks import TaskSource
from llada_jax.text import ChatError, ChatTemplate, TokenizerError, load_tokenizer
from llada_jax.text.protocol import well_formed
from llada_jax.text.train_sentencepiece import train_sentencepiece

SPACE = "\u2581"  # sentencepiece's own space, the one character that it cannot tell from " "


def texts():
    return (m["content"] for element in TaskSource(size=300) for m in element["messages"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "model"
    train_sentencepiece(texts(), folder, 480)
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    return load_tokenizer(folder)


def shown(tokenizer, text):
    return [tokenizer.token_text(token) for token in tokenizer.encode(text)]


@given(st.text().filter(lambda text: SPACE not in text))
@example("  two  spaces \n\n and\ttabs\r\n")
@example("naïve 漢字 😀 \ufeff\0")
@example("<|mask|> <unk> <0x41> HUMANE ####1")
@example("lone \ud800 surrogate")
def test_text_decodes_to_itself(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == well_formed(text)
    assert trained.mask_token_id not in ids


def test_token_boundaries_are_regular(trained):
    assert shown(trained, "Add 3+47") == ["Add", " ", "3", "+", "4", "7"]
    assert shown(trained, "7+3=10\n#### 50") == [*"7+3=10\n", "####", " ", "5", "0"]
    assert shown(trained, "Solve 1../") == ["Solve", " ", *"1../"]


def test_special_tokens(trained):
    assert trained.vocab_size <= 480
    names = ["<|endoftext|>", "<|mask|>", "<role>", "</role>", "<|role_end|>"]
    assert sorted(trained.special_token_ids) == [1, 2, 3, 4, 5]
    assert [trained.token_text(token) for token in range(1, 6)] == names
    assert trained.pad_token_id == trained.eos_token_id == 1
    assert trained.mask_token_id == 2


def test_conversations(folder, trained):
    template = ChatTemplate.from_folder(folder, trained)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Add 1+2"},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "Add 3+4"},
    ]
    text = template.render(messages)
    assert text == (
        "<role>SYSTEM</role>Be brief.<|role_end|><role>HUMAN</role>Add 1+2<|role_end|>"
        "<role>ASSISTANT</role>3<|role_end|><role>HUMAN</role>Add 3+4<|role_end|>"
        "<role>ASSISTANT</role>"
    )
    ids = trained.encode(text)
    assert trained.decode(ids, skip_special_tokens=False) == text
    assert shown(trained, text)[-4:] == ["<|role_end|>", "<role>", "ASSISTANT", "</role>"]
    whole = template.render(messages, add_generation_prompt=False)
    assert whole + "<role>ASSISTANT</role>" == text
    with pytest.raises(ChatError, match="was not trained to call tools"):
        template.render([{"role": "tool", "content": "1"}])
    with pytest.raises(ChatError, match="was not trained to call tools"):
        template.render(messages, tools=[{"name": "f"}])


def test_the_same_texts_give_the_same_files(folder, tmp_path):
    train_sentencepiece(texts(), tmp_path, 480)
    for file in folder.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    shutil.rmtree(tmp_path)


def test_own_template_and_characters(tmp_path):
    train_sentencepiece(texts(), tmp_path, chat_template="{{ messages[0].content }}",
                        max_piece_length=1)  # fmt: skip
    tokenizer = load_tokenizer(tmp_path)
    assert shown(tokenizer, "Add 3") == list("Add 3")
    assert ChatTemplate.from_folder(tmp_path).render([{"role": "user", "content": "x"}]) == "x"


def test_errors(tmp_path, capfd):
    with pytest.raises(TokenizerError, match=r"vocab_size = 100 is too small .* at least 362"):
        train_sentencepiece(["a"], tmp_path, 100)
    with pytest.raises(TokenizerError, match="give more texts"):
        train_sentencepiece([], tmp_path)
    with pytest.raises(TokenizerError, match="or a larger vocab_size"):
        train_sentencepiece(["".join(map(chr, range(0x4E00, 0x5200)))] * 3, tmp_path)
    assert capfd.readouterr().err == ""
    assert not list(tmp_path.iterdir())
