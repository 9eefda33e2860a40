"""Malformed conversations are refused with the place that is wrong."""

import pytest

from llada_jax.text import ChatError, ChatTemplate, check_messages
from llada_jax.text.messages import check_tools

GOOD = {"role": "user", "content": "x"}


def calls(*items, content=None):
    return {"role": "assistant", "content": content, "tool_calls": list(items)}


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("hello", "must be a list of messages, not str"),
        (None, "must be a list of messages, not nothing"),
        ({"role": "user"}, "must be a list of messages, not dict"),
        ([], "messages is empty"),
        ([GOOD, "x"], r"messages\[1\] must be an object .* not str"),
        ([GOOD, {"content": "x"}], r"messages\[1\] has role None; use one of system, user"),
        ([{"role": "bot", "content": "x"}], r"messages\[0\] has role 'bot'"),
        ([{"role": ["user"], "content": "x"}], r"messages\[0\] has role \['user'\]"),
        ([{"role": "user"}], r"messages\[0\] must have a string as content, not nothing$"),
        ([{"role": "user", "content": [{"text": "x"}]}], "a string as content, not list"),
        ([{"role": "assistant", "content": None}], "beside tool_calls"),
        ([{"role": "assistant", "content": None, "tool_calls": []}], "beside tool_calls"),
        ([{**GOOD, "tool_calls": [{}]}], r"messages\[0\] has tool_calls; only an assistant"),
        ([calls(content=3)], "a string as content, not int"),
        ([{"role": "assistant", "tool_calls": "f()"}], "tool_calls must be a list, not str"),
        ([calls("f()")], r"messages\[0\]\.tool_calls\[0\] must be an object .* not str"),
        ([calls({"function": "f()"})], r"tool_calls\[0\] must be an object .* not str"),
        ([calls({"arguments": {}})], r"tool_calls\[0\] must have a string as name, not nothing"),
        ([calls({"name": "f"})], r"tool_calls\[0\] must have an object .* arguments, not nothing"),
    ],
)
def test_malformed(messages, said):
    with pytest.raises(ChatError, match=said):
        check_messages(messages)


def test_well_formed():
    call = {"name": "f", "arguments": "{}"}
    check_messages([GOOD, calls(call), calls({"function": call}, content="x")])
    check_messages([{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": ""}])
    check_messages((GOOD,))


def test_render_checks():
    with pytest.raises(ChatError, match=r"messages\[0\]"):
        ChatTemplate.llada2().render([{"role": "bot", "content": "x"}])


@pytest.mark.parametrize("tools", ["x", {"name": "f"}, [{}, "f"], 3])
def test_tools(tools):
    with pytest.raises(ChatError, match="tools"):
        check_tools(tools)
    check_tools(None)
    check_tools([{}])
