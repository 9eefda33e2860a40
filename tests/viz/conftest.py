import io

import numpy as np
import pytest
from rich.console import Console

from llada_jax.decoding import Phase, TraceStep

MASK = 999


class TableTokenizer:
    """Token ids are places in a list of texts."""

    mask_token_id = MASK
    pad_token_id = None
    special_token_ids = frozenset({MASK})

    def __init__(self, texts, eos_token_id=None):
        self._texts = list(texts)
        self.vocab_size = 1000
        self.eos_token_id = eos_token_id

    def encode(self, text):
        return [self._texts.index(c) for c in text]

    def decode(self, token_ids, *, skip_special_tokens=True):
        return "".join(
            self.token_text(t) for t in token_ids if not (skip_special_tokens and t == MASK)
        )

    def token_text(self, token_id):
        return "<|mask|>" if token_id == MASK else self._texts[token_id]


def make_step(before, after, start=0, block_index=0, phase=Phase.DENOISE):
    before, after = np.array(before, np.int32), np.array(after, np.int32)
    changed, masked = before != after, before == MASK
    return TraceStep(
        phase=phase,
        start=start,
        block_index=block_index,
        before=before,
        after=after,
        unmasked=changed & masked,
        edited=changed & ~masked,
        proposal=after,
        confidence=np.full(len(after), 0.5, np.float32),
    )


@pytest.fixture
def plain():
    """A console that is no terminal and has no colour."""

    def make(width=80, encoding="utf-8"):
        file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        return Console(file=file, width=width, color_system=None, force_terminal=False)

    return make


def written(console: Console) -> str:
    console.file.flush()
    return console.file.buffer.getvalue().decode(console.file.encoding)
