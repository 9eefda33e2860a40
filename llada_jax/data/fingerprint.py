"""What tokenised data depends on, as one short string: another value, another cache entry."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from llada_jax.text import ChatError, ChatTemplate, Tokenizer

# Texts on which tokenizers with one vocabulary but other rules (merges, spaces, digits) differ.
_TEXTS = (
    "The quick brown fox jumps over 13 lazy dogs. It's 3.14159, isn't it?  Two  spaces,\ttabs\n\n"
    "  def train(self, *args, **kwargs):\n        return self.x[0] != 2 ** 31  # ok\n",
    "Größe naïve Ελληνικά русский текст 你好，世界 こんにちは 안녕하세요 "
    "مرحبا 👩‍🚀 e\u0301 \u00a0x",
    "internationalisation antidisestablishmentarianism 1234567890 <|mask|> <role>HUMAN</role>",
)
_CALL = {"name": "add", "arguments": {"a": 1, "b": 2}}
_CONVERSATIONS: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": "Hi"}],
    [{"role": "user", "content": " Hi\n"}, {"role": "assistant", "content": " Hello\n "}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "<think>\neasy\n</think>\n\n2"},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "<think>\nalso easy\n</think>\n\n4"},
    ],
    [
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "content": "", "tool_calls": [_CALL]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "3"},
    ],
)
_TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": {}, "b": {}}}}]


def file_fingerprint(file: Path) -> str:
    """A hash of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """A hash of a tokenizer's vocabulary and of what it makes of some texts."""
    ids = (tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return digest(
        type(tokenizer).__name__,
        ids,
        sorted(tokenizer.special_token_ids),
        [tokenizer.token_text(token) for token in range(tokenizer.vocab_size)],
        [tokenizer.encode(text) for text in _TEXTS],
    )


def template_fingerprint(template: ChatTemplate | None) -> str:
    """A hash of what a chat template makes of some conversations."""
    if template is None:
        return "none"
    rendered: list[str] = []
    for messages in _CONVERSATIONS:
        for tools in (None, _TOOLS):
            for prompt in (True, False):
                try:
                    text = template.render(messages, tools=tools, add_generation_prompt=prompt)
                except ChatError as error:
                    text = f"refused: {error}"
                rendered.append(text)
    return digest(rendered)


def digest(*parts: Any) -> str:
    """A hash of JSON values."""
    data = json.dumps(parts, sort_keys=True).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=16).hexdigest()
