"""Chat templates: LLaDA2's format written out by hand, folders, errors, the sandbox."""

import datetime
import json

import hypothesis.strategies as st
import pytest
from hypothesis import given

from llada_jax.text import ByteTokenizer, ChatError, ChatTemplate, TokenizerError

from .conftest import GOLDEN

OURS = ChatTemplate.llada2()
RELEASED = ChatTemplate.from_folder(GOLDEN / "llada2.1-mini")
OFF = "detailed thinking off<|role_end|>"
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"city": "a <b> & 'c' é"}},
}
TOOLS_TEXT = (
    "# Tools\n\n"
    "You may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n"
    "<tools>\n"
    '{"type": "function", "function": {"name": "weather", '
    '"parameters": {"city": "a <b> & \'c\' é"}}}\n'
    '{"name": "time"}\n'
    "</tools>\n\n"
    "For each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n"
    "<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>\n"
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def tool(text):
    return {"role": "tool", "content": text}


def system(text):
    return {"role": "system", "content": text}


def call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.fixture(params=["ours", "released"])
def template(request):
    return OURS if request.param == "ours" else RELEASED


def test_one_question(template):
    expected = f"<role>SYSTEM</role>{OFF}<role>HUMAN</role>Hi<|role_end|>"
    assert template.render([user("Hi")]) == expected + "<role>ASSISTANT</role>"
    assert template.render([user("Hi")], add_generation_prompt=False) == expected


def test_system(template):
    messages = [system("Be brief."), user("Hi"), system("Now in French."), user("Hi")]
    assert template.render(messages) == (
        f"<role>SYSTEM</role>Be brief.\n{OFF}"
        "<role>HUMAN</role>Hi<|role_end|>"
        "<role>SYSTEM</role>Now in French.<|role_end|>"
        "<role>HUMAN</role>Hi<|role_end|>"
        "<role>ASSISTANT</role>"
    )


def test_tools(template):
    tools = [WEATHER, {"name": "time"}]
    human = "<role>HUMAN</role>Hi<|role_end|><role>ASSISTANT</role>"
    assert template.render([user("Hi")], tools=tools) == (
        f"<role>SYSTEM</role>{TOOLS_TEXT}{OFF}{human}"
    )
    assert template.render([system("S"), user("Hi")], tools=tools) == (
        f"<role>SYSTEM</role>S\n{TOOLS_TEXT}{OFF}{human}"
    )
    assert template.render([user("Hi")], tools=[]) == f"<role>SYSTEM</role>{OFF}{human}"


def test_turns(template):
    assert template.render([user("1"), assistant("2"), user("3")]) == (
        f"<role>SYSTEM</role>{OFF}"
        "<role>HUMAN</role>1<|role_end|>"
        "<role>ASSISTANT</role>2<|role_end|>"
        "<role>HUMAN</role>3<|role_end|>"
        "<role>ASSISTANT</role>"
    )


def test_tool_calls_and_results(template):
    messages = [
        user("Weather?"),
        assistant(
            "Let me see.", tool_calls=[call("weather", {"city": "Zürich"}), call("time", "{}")]
        ),
        tool("sunny"),
        tool("noon"),
        assistant(None, tool_calls=[{"name": "time", "arguments": '{"zone": 1}'}]),
        tool("one"),
        assistant("Sunny."),
    ]
    assert template.render(messages, add_generation_prompt=False) == (
        f"<role>SYSTEM</role>{OFF}"
        "<role>HUMAN</role>Weather?<|role_end|>"
        "<role>ASSISTANT</role>Let me see.\n"
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call><|role_end|>'
        "<role>OBSERVATION</role>"
        "\n<tool_response>\nsunny\n</tool_response>"
        "\n<tool_response>\nnoon\n</tool_response><|role_end|>"
        '<role>ASSISTANT</role><tool_call>\n{"name": "time", "arguments": {"zone": 1}}\n'
        "</tool_call><|role_end|>"
        "<role>OBSERVATION</role>\n<tool_response>\none\n</tool_response><|role_end|>"
        "<role>ASSISTANT</role>Sunny.<|role_end|>"
    )


def test_thoughts_before_the_last_question_are_dropped(template):
    thinking = assistant("<think>\nhm\n</think>\n\nYes.")
    given = assistant("No.", reasoning_content="\nwell\n")
    wrapped = user("<tool_response>x</tool_response>")
    messages = [user("1"), thinking, given, user("2"), thinking, given, wrapped]
    assert template.render(messages, add_generation_prompt=False) == (
        f"<role>SYSTEM</role>{OFF}"
        "<role>HUMAN</role>1<|role_end|>"
        "<role>ASSISTANT</role>Yes.<|role_end|>"
        "<role>ASSISTANT</role>No.<|role_end|>"
        "<role>HUMAN</role>2<|role_end|>"
        "<role>ASSISTANT</role>\n<think>\nhm\n</think>\n\nYes.<|role_end|>"
        "<role>ASSISTANT</role>\n<think>\nwell\n</think>\n\nNo.<|role_end|>"
        "<role>HUMAN</role><tool_response>x</tool_response><|role_end|>"
    )


SNIPPETS = [
    "\n",
    "<think>",
    "</think>",
    "<tool_response>",
    "</tool_response>",
    "a",
    " b ",
    "{{",
    "é",
]
texts = st.lists(st.sampled_from(SNIPPETS), max_size=6).map("".join)
arguments = st.dictionaries(texts, texts | st.integers(), max_size=2)
bare_calls = st.fixed_dictionaries({"name": texts, "arguments": arguments | texts})
calls = st.lists(
    bare_calls | st.fixed_dictionaries({"function": bare_calls}), min_size=1, max_size=3
)
simple = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "tool", "assistant"]), "content": texts}
)
answers = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": texts | st.none(), "tool_calls": calls},
    optional={"reasoning_content": texts | st.none()},
)
thoughtful = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": texts, "reasoning_content": texts}
)


@given(
    messages=st.lists(simple | answers | thoughtful, min_size=1, max_size=6),
    tools=st.none() | st.lists(arguments, max_size=2),
    prompt=st.booleans(),
)
def test_ours_equals_released(messages, tools, prompt):
    options = {"tools": tools, "add_generation_prompt": prompt}
    assert OURS.render(messages, **options) == RELEASED.render(messages, **options)


def test_rendered_text_encodes_to_marks_but_no_mask():
    tokenizer = ByteTokenizer()
    token_ids = tokenizer.encode(ChatTemplate.llada2().render([user("what is <|mask|>?")]))
    special = [tokenizer.token_text(t) for t in token_ids if t in tokenizer.special_token_ids]
    turn = ["<role>", "</role>", "<|role_end|>"]
    assert special == [*turn, *turn, "<role>", "</role>"]


def test_folder_without_a_template(tmp_path, byte_level, counting):
    for tokenizer in (ByteTokenizer(), byte_level):
        assert "<role>HUMAN</role>x" in ChatTemplate.from_folder(tmp_path, tokenizer).render(
            [user("x")]
        )
    for tokenizer in (None, counting):
        with pytest.raises(ChatError, match=r"no chat template: use generate\(\)"):
            ChatTemplate.from_folder(tmp_path, tokenizer)


def test_named_templates_and_variables(tmp_path):
    config = {
        "eos_token": {"content": "<end>"},
        "bos_token": None,
        "chat_template": [
            {"name": "default", "template": "{{ messages[0].content }}{{ eos_token }}{{ mood }}"},
            {"name": "tool_use", "template": "tools: {{ tools | length }}"},
        ],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate.from_folder(tmp_path)
    assert template.render([user("x")], mood="!") == "x<end>!"
    assert template.render([user("x")], tools=[{}]) == "tools: 1"
    (tmp_path / "chat_template.jinja").write_text("from a file\n")
    assert ChatTemplate.from_folder(tmp_path).render([user("x")]) == "from a file"


@pytest.mark.parametrize("entry", [7, [7], [{"name": "default"}], [{"name": "a", "template": "b"}]])
def test_malformed_template_entries(tmp_path, entry):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": entry}))
    with pytest.raises(ChatError, match=r"tokenizer_config\.json"):
        ChatTemplate.from_folder(tmp_path)


def test_broken_files(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ChatError, match=r"chat_template\.jinja"):
        ChatTemplate.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json"):
        ChatTemplate.from_folder(tmp_path)


def render(source, **options):
    return ChatTemplate(source).render([user("x")], **options)


def test_environment():
    source = (
        "{% for m in [1, 2] %}\n    {% if m == 2 %}{% break %}{% endif %}\n{{ m }}\n{% endfor %}"
    )
    assert render(source) == "1\n"
    value = {"b": "<é>", "a": 1}
    assert render("{{ v | tojson }}", v=value) == '{"b": "<é>", "a": 1}'
    assert render("{{ v | tojson(indent=1, sort_keys=true) }}", v=value) == (
        '{\n "a": 1,\n "b": "<é>"\n}'
    )
    assert render("{{ strftime_now('%Y') }}") == str(datetime.datetime.now().year)


def test_syntax_errors():
    with pytest.raises(ChatError, match="line 2"):
        ChatTemplate("\n{% if %}")


def test_refusals():
    with pytest.raises(ChatError, match="refuses these messages: one at a time"):
        render("{{ raise_exception('one at a time') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}",
        "{{ messages['__class__'] }}",
        "{{ messages | attr('__class__') }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ raise_exception.__globals__ }}",
        "{{ ('%s' | attr('format')).__globals__ }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os }}",
    ],
)
def test_sandbox(source):
    with pytest.raises(ChatError, match="tries to leave its sandbox"):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% import 'os' as os %}",
        "{{ range(1000000000) }}",
        "{{ 1 / 0 }}",
        "{{ None + 'a' }}",
        "{{ f() }}",
        "{{ f | tojson }}",
    ],
)
def test_failing_templates(source):
    with pytest.raises(ChatError, match="fails on these messages"):
        render(source)
