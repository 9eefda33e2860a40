"""What a conversation must look like before a template may turn it into text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ROLES = ("system", "user", "assistant", "tool")


class ChatError(ValueError):
    """A conversation or template that cannot be rendered; the message says which part, and why."""


def check_messages(messages: Any) -> None:
    """Checks that ``messages`` is a conversation in OpenAI's form.

    A message is an object with a ``role`` and a ``content`` string. An assistant's content may be
    missing or ``None`` if it has ``tool_calls``: objects with a ``name`` and ``arguments`` (an
    object, or a string of JSON), bare or under ``function``.

    Raises:
      ChatError: naming the first message that is wrong.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise ChatError(f"messages must be a list of messages, not {_kind(messages)}")
    if not messages:
        raise ChatError("messages is empty; a conversation needs at least one message")
    for index, message in enumerate(messages):
        _check_message(message, f"messages[{index}]")


def check_tools(tools: Any) -> None:
    """Checks that ``tools`` is ``None`` or a list of objects.

    Raises:
      ChatError: naming the first tool that is wrong.
    """
    if tools is None:
        return
    if not isinstance(tools, Sequence) or isinstance(tools, str | bytes):
        raise ChatError(f"tools must be a list of objects, not {_kind(tools)}")
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise ChatError(f"tools[{index}] must be an object, not {_kind(tool)}")


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, Mapping):
        raise ChatError(f"{where} must be an object with role and content, not {_kind(message)}")
    role = message.get("role")
    if role not in ROLES:
        raise ChatError(f"{where} has role {role!r}; use one of {', '.join(ROLES)}")
    calls = message.get("tool_calls")
    if calls is not None:
        if role != "assistant":
            raise ChatError(f"{where} has tool_calls; only an assistant's message can")
        if not isinstance(calls, Sequence) or isinstance(calls, str | bytes):
            raise ChatError(f"{where}.tool_calls must be a list, not {_kind(calls)}")
        for index, call in enumerate(calls):
            _check_tool_call(call, f"{where}.tool_calls[{index}]")
    content = message.get("content")
    if isinstance(content, str) or (content is None and calls):
        return
    exception = " (it may be null beside tool_calls)" if role == "assistant" else ""
    raise ChatError(f"{where} must have a string as content, not {_kind(content)}{exception}")


def _check_tool_call(call: Any, where: str) -> None:
    function = call.get("function") or call if isinstance(call, Mapping) else call
    if not isinstance(function, Mapping):
        raise ChatError(f"{where} must be an object with name and arguments, not {_kind(function)}")
    if not isinstance(function.get("name"), str):
        raise ChatError(f"{where} must have a string as name, not {_kind(function.get('name'))}")
    arguments = function.get("arguments")
    if not isinstance(arguments, str | Mapping):
        raise ChatError(
            f"{where} must have an object or a string of JSON as arguments, not {_kind(arguments)}"
        )


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__
