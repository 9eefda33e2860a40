"""Which tokens of a rendered conversation are learnt."""

import numpy as np
import pytest

from llada_jax.data import Conversation, DataError, DocumentTokenizer, RecordError, Text
from llada_jax.text import ByteTokenizer, ChatTemplate


def turns(*contents: str) -> Conversation:
    roles = ("user", "assistant")
    return Conversation([{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)])


def learnt(document, tokenizer) -> list[str]:
    return [shown(document.tokens[a:b], tokenizer) for a, b in document.spans]


def shown(tokens, tokenizer) -> str:
    return tokenizer.decode(tokens.tolist(), skip_special_tokens=False)


@pytest.fixture(params=["bytes_", "hf"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def test_last_turn(tokenizer, template):
    document = DocumentTokenizer(tokenizer, template)(turns("one?", "1 ma", "two?", "mask 2"))
    assert learnt(document, tokenizer) == ["mask 2<|role_end|>"]
    assert shown(document.tokens, tokenizer).endswith(
        "<role>HUMAN</role>two?<|role_end|><role>ASSISTANT</role>mask 2<|role_end|>"
    )
    assert document.supervised.sum() == len(tokenizer.encode("mask 2")) + 1
    assert not document.is_text


def test_all_turns(tokenizer, template):
    document = DocumentTokenizer(tokenizer, template, last_turn_only=False)(
        turns("one?", "1 ma", "two?", "mask 2")
    )
    assert learnt(document, tokenizer) == ["1 ma<|role_end|>", "mask 2<|role_end|>"]


def test_a_greeting_is_not_learnt(bytes_, template):
    greeting = {"role": "assistant", "content": "hello"}
    record = Conversation([greeting, *turns("one?", "1").messages])
    document = DocumentTokenizer(bytes_, template, last_turn_only=False)(record)
    assert learnt(document, bytes_) == ["1<|role_end|>"]


def test_system_tools_and_calls(bytes_, template):
    call = {"name": "add", "arguments": {"a": 1}}
    record = Conversation(
        [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "two"},
        ],
        tools=[{"name": "add"}],
    )
    document = DocumentTokenizer(bytes_, template, last_turn_only=False)(record)
    first, second = learnt(document, bytes_)
    assert first.startswith('\n<tool_call>\n{"name": "add"') or first.startswith("<tool_call>")
    assert second == "two<|role_end|>"
    assert '{"name": "add"}' in shown(document.tokens[: document.spans[0][0]], bytes_)


def test_thoughts(bytes_, template):
    record = turns("one?", "<think>\nhm\n</think>\n\n1", "two?", "<think>\nso\n</think>\n\n2")
    document = DocumentTokenizer(bytes_, template)(record)
    assert learnt(document, bytes_) == ["\n<think>\nso\n</think>\n\n2<|role_end|>"]
    with pytest.raises(RecordError, match=r"messages\[1\] is rendered in another way.*last_turn_o"):
        DocumentTokenizer(bytes_, template, last_turn_only=False)(record)


def test_text_ends(tokenizer):
    document = DocumentTokenizer(tokenizer, None)(Text("ma sk"))
    assert document.tokens.tolist() == [*tokenizer.encode("ma sk"), tokenizer.eos_token_id]
    assert document.supervised.all()
    assert document.is_text
    assert document.tokens.dtype == np.int32


def test_conversations_need_a_template(bytes_):
    with pytest.raises(DataError, match="need a chat template"):
        DocumentTokenizer(bytes_, None)(turns("a", "b"))


def test_the_prompt_must_be_a_beginning(bytes_):
    odd = "{% for m in messages %}{{ m.content }};{% endfor %}{{ 'x' if add_generation_prompt }}"
    with pytest.raises(RecordError, match="is not the beginning of the rendered conversation"):
        DocumentTokenizer(bytes_, ChatTemplate(odd))(turns("a", "b"))
    forgetful = "{% for m in messages if m.role == 'user' %}{{ m.content }};{% endfor %}"
    with pytest.raises(RecordError, match="an answer that the chat template leaves out"):
        DocumentTokenizer(bytes_, ChatTemplate(forgetful))(turns("a", "b"))


def test_a_template_may_refuse(bytes_):
    refusing = ChatTemplate("{{ raise_exception('no system') }}")
    with pytest.raises(RecordError, match="refuses these messages: no system"):
        DocumentTokenizer(bytes_, refusing)(turns("a", "b"))


def test_an_end_token_is_needed(template):
    class Endless(ByteTokenizer):
        eos_token_id = None

    with pytest.raises(DataError, match="names no end token"):
        DocumentTokenizer(Endless(), template)
