"""Tool calls in an answer, against the template that writes them."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from llada_jax.text import ChatTemplate, ToolCall, parse_tool_calls


def test_example():
    text = (
        'Let me see.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n'
        '<tool_call>{"name": "g", "arguments": "{\\"b\\": [2]}"}</tool_call> Done.'
    )
    calls = [ToolCall("f", {"a": 1}), ToolCall("g", {"b": [2]})]
    assert parse_tool_calls(text) == ("Let me see. Done.", calls)


def test_no_arguments():
    assert parse_tool_calls('<tool_call>{"name": "f"}</tool_call>') == ("", [ToolCall("f", {})])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no call",
        "<tool_call>",
        '<tool_call>{"name": "f", "arguments": {}}',
        '<tool_call>{"name": "f", "arguments": {}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {}} x</tool_call>',
        '<tool_call>["f"]</tool_call>',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "x"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "[1]"}</tool_call>',
        "<tool_call>" + "[" * 100_000 + "</tool_call>",
    ],
)
def test_broken_calls_stay(text):
    assert parse_tool_calls(text) == (text, [])


def test_a_broken_call_does_not_hide_the_next():
    good = '<tool_call>{"name": "f"}</tool_call>'
    assert parse_tool_calls("<tool_call>oops" + good) == ("<tool_call>oops", [ToolCall("f", {})])
    nested = '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>"}}</tool_call>'
    assert parse_tool_calls(nested) == ("", [ToolCall("f", {"a": "</tool_call>"})])


TEMPLATE = ChatTemplate.llada2()
names = st.text("abc_", min_size=1, max_size=8)
values = st.text(max_size=8) | st.integers() | st.booleans() | st.none()
arguments = st.dictionaries(st.text(max_size=4), values, max_size=3)


@given(
    text=st.text("ab \n", max_size=8),
    calls=st.lists(st.builds(ToolCall, names, arguments), min_size=1, max_size=3),
)
def test_reads_what_the_template_writes(text, calls):
    written = [{"name": call.name, "arguments": call.arguments} for call in calls]
    message = {"role": "assistant", "content": text, "tool_calls": written}
    rendered = TEMPLATE.render([message], add_generation_prompt=False)
    answer = rendered.split("<role>ASSISTANT</role>")[1].removesuffix("<|role_end|>")
    assert parse_tool_calls(answer) == (text, calls)
