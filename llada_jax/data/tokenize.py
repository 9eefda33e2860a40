"""From a conversation or a text to tokens, and which of them are to be learnt."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Int32

from llada_jax.data.errors import DataError
from llada_jax.data.records import Conversation, RecordError, Text
from llada_jax.text import ChatError, ChatTemplate, Tokenizer


@dataclasses.dataclass(frozen=True)
class Document:
    """Tokens of one document, before it is filled up to a block boundary.

    Attributes:
      tokens: a rendered conversation; or a text and one end token.
      spans: half-open ranges of supervised tokens, in order. The last one ends with the document.
      is_text: a plain text, which may be cut into pieces.
    """

    tokens: Int32[np.ndarray, " length"]
    spans: tuple[tuple[int, int], ...]
    is_text: bool

    @property
    def supervised(self) -> Bool[np.ndarray, " length"]:
        """Which tokens noise may change and the loss covers."""
        mask = np.zeros(len(self.tokens), bool)
        for start, stop in self.spans:
            mask[start:stop] = True
        return mask


@dataclasses.dataclass(frozen=True)
class DocumentTokenizer:
    """Turns records into documents.

        <role>HUMAN</role>2+2?<|role_end|><role>ASSISTANT</role>4<|role_end|>
        └──────────────── the prompt: visible ─────────────────┘└ supervised ┘

    Attributes:
      tokenizer: whose end token ends a text.
      template: renders conversations; ``None`` if there are only texts.
      last_turn_only: supervise the last assistant turn only, not the earlier ones.

    Raises:
      DataError: if the tokenizer has no end token.
    """

    tokenizer: Tokenizer
    template: ChatTemplate | None
    last_turn_only: bool = True

    def __post_init__(self):
        if self.tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer names no end token, with which documents are filled up; add "
                "eos_token to its tokenizer_config.json"
            )

    def __call__(self, record: Conversation | Text) -> Document:
        """Tokenises a record.

        Raises:
          RecordError: if the template refuses the conversation, or renders it so that a prompt is
            not its beginning.
          DataError: if there is no template for a conversation.
        """
        if isinstance(record, Text):
            tokens = [*self.tokenizer.encode(record.text), self.tokenizer.eos_token_id]
            return Document(np.array(tokens, np.int32), ((0, len(tokens)),), is_text=True)
        if self.template is None:
            raise DataError(
                "conversations need a chat template: add a chat_template.jinja to the model "
                "folder, or train on plain text"
            )
        messages = record.messages
        full = self._rendered(record, len(messages), prompt=False)
        if self.last_turn_only:
            turns = [len(messages) - 1]
        else:
            turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        spans: list[tuple[int, int]] = []
        for turn in turns:
            if turn == 0:
                continue  # a greeting before anything was asked
            start = self._boundary(full, record, turn, prompt=True)
            last = turn == len(messages) - 1
            stop = len(full) if last else self._boundary(full, record, turn + 1, prompt=False)
            if start < stop:
                spans.append((start, stop))
        if not spans or spans[-1][1] != len(full):
            raise RecordError("has an answer that the chat template leaves out; shorten or drop it")
        return Document(np.array(full, np.int32), tuple(spans), is_text=False)

    def _rendered(self, record: Conversation, count: int, *, prompt: bool) -> list[int]:
        """Tokens of the first messages."""
        assert self.template is not None
        try:
            text = self.template.render(
                record.messages[:count], tools=record.tools, add_generation_prompt=prompt
            )
        except ChatError as error:
            raise RecordError(str(error)) from error
        return self.tokenizer.encode(text)

    def _boundary(self, full: list[int], record: Conversation, count: int, *, prompt: bool) -> int:
        """Where the first messages end in the full conversation."""
        part = self._rendered(record, count, prompt=prompt)
        if full[: len(part)] == part:
            return len(part)
        if count == len(record.messages) - 1:
            raise RecordError(
                "the prompt, rendered by itself, is not the beginning of the rendered "
                "conversation, so the response has no beginning; the chat template must end the "
                "prompt where the answer starts (see add_generation_prompt)"
            )
        raise RecordError(
            f"messages[{count - 1}] is rendered in another way when more messages follow (such as "
            "an earlier answer without its thoughts); set last_turn_only: true"
        )
