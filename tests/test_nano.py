"""The model that the package ships: small, the default, and good at what its page says."""

import jax
import pytest

from llada_jax import LLM, SamplingParams
from llada_jax.eval import evaluate
from llada_jax.llm import model_folder
from llada_jax.tasks import make_task


@pytest.fixture(scope="module")
def nano():
    return LLM(max_batch_size=32)


def test_size(nano):
    assert sum(weight.size for weight in jax.tree.leaves(nano.params)) <= 8_000_000
    assert sum(file.stat().st_size for file in model_folder().iterdir()) <= 12_000_000
    assert nano.tokenizer.vocab_size <= 1000


def test_solves_held_out_sudokus_and_editing_helps(nano):
    def accuracy(task, **settings):
        params = SamplingParams(max_tokens=64, **settings)
        return evaluate(nano, make_task(task), 32, params).accuracy

    assert accuracy("sudoku", threshold=0.7, editing_threshold=0.5) > 0.85
    edited = accuracy("addition", threshold=0.5, editing_threshold=0.0)
    assert edited > 0.7
    assert edited > accuracy("addition", threshold=0.5, editing_threshold=None) + 0.1
