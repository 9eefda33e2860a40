"""Function calls in a model's answer."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

_OPEN = "<tool_call>"
_CLOSE = "</tool_call>"


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A function that the model wants called, with its arguments by name."""

    name: str
    arguments: dict[str, Any]


def parse_tool_calls(text: str) -> tuple[str, list[ToolCall]]:
    """Takes the calls ``<tool_call>{"name": …, "arguments": {…}}</tool_call>`` out of an answer.

    Returns:
      The text without the calls and without the newline that sets each of them off, and the calls
      in order. A call that is not valid JSON of this form stays in the text.
    """
    kept: list[str] = []
    calls: list[ToolCall] = []
    done = 0
    start = text.find(_OPEN)
    while start >= 0:
        parsed = _parse_call(text, start)
        if parsed is None:
            start = text.find(_OPEN, start + len(_OPEN))
            continue
        call, end = parsed
        kept.append(text[done:start].removesuffix("\n"))
        calls.append(call)
        done = end
        start = text.find(_OPEN, end)
    return "".join((*kept, text[done:])), calls


def _parse_call(text: str, start: int) -> tuple[ToolCall, int] | None:
    """The call whose opening tag stands at ``start``, and where its closing tag ends.

    The JSON decides where the call ends, for an argument may contain the closing tag.
    """
    begin = _skip_space(text, start + len(_OPEN))
    try:
        value, end = json.JSONDecoder().raw_decode(text, begin)
        if isinstance(value, dict) and isinstance(value.get("arguments"), str):
            value["arguments"] = json.loads(
                value["arguments"]
            )  # JSON within JSON, as OpenAI has it
    except (ValueError, RecursionError):
        return None
    end = _skip_space(text, end)
    if not text.startswith(_CLOSE, end) or not isinstance(value, dict):
        return None
    name, arguments = value.get("name"), value.get("arguments", {})
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return ToolCall(name, arguments), end + len(_CLOSE)


def _skip_space(text: str, index: int) -> int:
    while index < len(text) and text[index].isspace():
        index += 1
    return index
