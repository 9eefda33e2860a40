"""From a row of a file to a conversation or a text, whatever its keys are called."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from llada_jax.text import ChatError, check_messages

_QUESTIONS = ("prompt", "instruction", "question")
_ANSWERS = {
    "prompt": ("response", "completion"),
    "instruction": ("response", "output"),
    "question": ("answer",),
}
_KNOWN = (
    "messages, text, prompt and response, instruction (and input) and response or output, or "
    "question and answer"
)


class RecordError(ValueError):
    """A row that is no record; the message continues "FILE, line N: "."""


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages, the last of them the assistant's; and the tools that it may call."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None


@dataclasses.dataclass(frozen=True)
class Text:
    """A plain document."""

    text: str


def as_record(row: Any, text_keys: str | None = None) -> Conversation | Text:
    """Finds out what a row holds.

    A row is ``messages``, or ``text``, or a question and its answer in one of the usual spellings.
    A question may itself be a list of messages.

    Args:
      row: a parsed JSON object, a row of a table, or the text of a document.
      text_keys: the key of the messages or the text; ``None`` looks for the usual ones.

    Raises:
      RecordError: if the row holds nothing to learn from, or something malformed.
    """
    if isinstance(row, str):
        return _text(row, "the document")
    if not isinstance(row, Mapping):
        raise RecordError(f"is a {type(row).__name__}; make it an object with {_KNOWN}")
    if text_keys is not None:
        if row.get(text_keys) is None:
            raise RecordError(
                f"has no {text_keys!r}, which text_keys asks for; it has {_listed(row)}"
            )
        value = row[text_keys]
        if isinstance(value, str):
            return _text(value, text_keys)
        return _conversation(value, row, text_keys)
    if row.get("messages") is not None:
        return _conversation(row["messages"], row, "messages")
    for key in _QUESTIONS:
        if row.get(key) is not None:
            return _pair(row, key)
    if row.get("text") is not None:
        return _text(row["text"], "text")
    raise RecordError(
        f"has {_listed(row)}, but none of the keys that are known: {_KNOWN}; "
        "name the right one in text_keys"
    )


def _pair(row: Mapping[str, Any], key: str) -> Conversation:
    question = row[key]
    answers = _ANSWERS[key]
    found = next((name for name in answers if row.get(name) is not None), None)
    if found is None:
        raise RecordError(
            f"has a {key!r} but no {' or '.join(map(repr, answers))}; it has {_listed(row)}. "
            "To learn from it, add the answer"
        )
    answer = row[found]
    if not isinstance(answer, str):
        raise RecordError(f"has a {type(answer).__name__} as {found!r}; make it a string")
    if isinstance(question, list):
        turns = question
    elif isinstance(question, str):
        extra = row.get("input") if key == "instruction" else None
        if extra is not None and not isinstance(extra, str):
            raise RecordError(f"has a {type(extra).__name__} as 'input'; make it a string")
        turns = [{"role": "user", "content": f"{question}\n\n{extra}" if extra else question}]
    else:
        raise RecordError(
            f"has a {type(question).__name__} as {key!r}; make it a string or a list of messages"
        )
    return _conversation([*turns, {"role": "assistant", "content": answer}], row, key)


def _conversation(messages: Any, row: Mapping[str, Any], key: str) -> Conversation:
    if isinstance(messages, list):  # a table has all columns in every message
        messages = [_without_none(message) for message in messages]
    try:
        check_messages(messages)
    except ChatError as error:
        raise RecordError(f"{key!r}: {error}") from error
    last = messages[-1]
    if last["role"] != "assistant":
        raise RecordError(
            f"{key!r} ends with a message of {last['role']!r}; there is nothing to learn unless "
            "the last one is the assistant's"
        )
    if len(messages) == 1:
        raise RecordError(f"{key!r} has only an answer; put the user's message before it")
    if not (last.get("content") or "").strip() and not last.get("tool_calls"):
        raise RecordError("has an empty response; fill it in or remove the row")
    tools = row.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise RecordError(f"has a {type(tools).__name__} as 'tools'; make it a list of objects")
    return Conversation(messages, tools or None)


def _text(text: Any, key: str) -> Text:
    if not isinstance(text, str):
        raise RecordError(f"has a {type(text).__name__} as {key!r}; make it a string")
    if not text.strip():
        raise RecordError(f"{key!r} is empty; fill it in or remove the row")
    return Text(text)


def _without_none(message: Any) -> Any:
    if not isinstance(message, Mapping):
        return message
    return {k: v for k, v in message.items() if v is not None or k in ("role", "content")}


def _listed(row: Mapping[str, Any]) -> str:
    return "the keys " + ", ".join(map(str, row)) if row else "no keys"
