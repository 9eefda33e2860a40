"""Makes a tokenizer for a small model: sentencepiece BPE, special tokens and a chat template.

Boundaries between tokens are regular, so that a small model can compute with them: every digit,
punctuation mark and newline is a token of its own wherever it stands.
"""

from __future__ import annotations

import io
import json
import string
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from llada_jax.text.protocol import MASK_TOKEN, TokenizerError, well_formed
from llada_jax.text.special import TOKENIZER_CONFIG

EOS_TOKEN = "<|endoftext|>"  # also the padding
ROLE_TOKENS = ("<role>", "</role>", "<|role_end|>")
ROLE_NAMES = ("SYSTEM", "HUMAN", "ASSISTANT")

CHAT_TEMPLATE = """\
{#- A turn is <role>NAME</role>text<|role_end|>; nothing stands between two. -#}
{%- set names = {'system': 'SYSTEM', 'user': 'HUMAN', 'assistant': 'ASSISTANT'} -%}
{%- for message in messages -%}
  {%- if message.role not in names or message.content is not string or tools -%}
    {{- raise_exception('this model was not trained to call tools; leave them out') -}}
  {%- endif -%}
  {{- '<role>' ~ names[message.role] ~ '</role>' ~ message.content ~ '<|role_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<role>ASSISTANT</role>' -}}
{%- endif -%}
"""

# Pieces that never become part of a longer one. (Digits: split_digits.)
_SINGLE = ("\n", "####", *string.punctuation)
_LETTERS = string.ascii_letters + string.digits
_SPACE = "\u2581"  # how sentencepiece writes a space
_SMALLEST = 256 + 1 + 2 + len((*ROLE_TOKENS, *ROLE_NAMES, *_SINGLE, *_LETTERS, _SPACE))


def train_sentencepiece(
    texts: Iterable[str],
    folder: str | Path,
    vocab_size: int = 512,
    *,
    chat_template: str | None = None,
    max_piece_length: int = 16,
) -> None:
    """Trains a tokenizer and writes the files that ``load_tokenizer`` and ``ChatTemplate`` read.

    Any text can be encoded, and decodes to itself: what the vocabulary lacks is spelled in bytes.
    (But for U+2581, which is how sentencepiece writes a space.) The same texts give the same file.

    Args:
      texts: what the tokenizer is for, as plain text without a chat template.
      folder: where ``tokenizer.model``, ``tokenizer_config.json`` and ``chat_template.jinja`` go;
        created if missing.
      vocab_size: tokens at most, special ones included; fewer if the texts do not hold as many.
      chat_template: Jinja; ``CHAT_TEMPLATE`` by default.
      max_piece_length: characters of a token at most; 1 gives every character its own token.

    Raises:
      TokenizerError: if the vocabulary is too small, or the texts cannot be used.
    """
    if vocab_size < _SMALLEST:
        raise TokenizerError(
            f"vocab_size = {vocab_size} is too small for bytes, ASCII and special tokens; use at "
            f"least {_SMALLEST}"
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            max_sentencepiece_length=max_piece_length,
            max_sentence_length=1 << 20,
            required_chars=_LETTERS,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            unk_id=0,
            eos_id=1,
            eos_piece=EOS_TOKEN,
            bos_id=-1,
            pad_id=-1,
            control_symbols=[MASK_TOKEN, *ROLE_TOKENS],
            user_defined_symbols=[*ROLE_NAMES, *_SINGLE],
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise TokenizerError(
            f"sentencepiece cannot train on these texts: {error}; give more texts, or a larger "
            "vocab_size"
        ) from error
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    entries = {
        "eos_token": EOS_TOKEN,
        "pad_token": EOS_TOKEN,
        "mask_token": MASK_TOKEN,
        "additional_special_tokens": list(ROLE_TOKENS),
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    config = json.dumps(entries, indent=2) + "\n"
    (folder / TOKENIZER_CONFIG).write_text(config, encoding="utf-8")
    template = CHAT_TEMPLATE if chat_template is None else chat_template
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines that are not empty: a newline is always a token of its own."""
    for text in texts:
        yield from (line for line in well_formed(text).split("\n") if line)
