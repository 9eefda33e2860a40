"""An evaluation against the same problems asked one by one."""

import logging

import jax
import numpy as np
import pytest

from llada_jax import SamplingParams
from llada_jax.eval import EvalError, TaskResult, evaluate, held_out_problems, mean_of
from llada_jax.tasks import is_held_out, make_task
from llada_jax.text import ChatError

from .conftest import CountOn

SPEED = SamplingParams.speed(max_tokens=40)


class Compilations(logging.Handler):
    """Collects what jax says when it compiles a program."""

    def __init__(self):
        super().__init__()
        self.found = []

    def emit(self, record):
        if "Compiling" in record.getMessage():
            self.found.append(record.getMessage())

    def __enter__(self):
        logging.getLogger("jax").addHandler(self)
        return self.found

    def __exit__(self, *_):
        logging.getLogger("jax").removeHandler(self)


def result(scores, **changes):
    fields = {
        "task": "sudoku", "difficulty": 2, "scores": scores, "num_tokens": 100, "num_forwards": 25,
        "num_edits": 10, "num_stopped": 3, "seconds": 2.0, "device": "cpu",
    }  # fmt: skip
    return TaskResult(**{**fields, **changes})


def test_evaluation_is_what_conversations_give(chat_llm, monkeypatch):
    seen, compiled = [], []
    generate = chat_llm.generate

    def watched(batch, params):
        with jax.log_compiles(), Compilations() as found:
            generations = generate(batch, params)
        compiled.append((len(batch), len(found)))
        return generations

    monkeypatch.setattr(chat_llm, "generate", watched)
    found = evaluate(
        chat_llm,
        CountOn(),
        4,
        SPEED,
        seed=1,
        batch_size=2,
        report=lambda *reported: seen.append(reported),
    )
    monkeypatch.undo()
    # One shape of two rows: a batch to compile it, then the two that are timed.
    assert [rows for rows, _ in compiled] == [2, 2, 2]
    assert [count for _, count in compiled[1:]] == [0, 0]
    problems = held_out_problems(CountOn(), 4, 1)
    assert found.n == len(problems) == 4
    assert sorted(problem.prompt for problem, _, _ in seen) == sorted(p.prompt for p in problems)
    conversations = [[{"role": "user", "content": problem.prompt}] for problem in problems]
    pairs = conversations[:2], conversations[2:]
    single = [one for pair in pairs for one in chat_llm.chat(pair, SPEED)]
    assert found.scores == tuple(
        CountOn().score(problem, one.text) for problem, one in zip(problems, single, strict=True)
    )
    assert found.accuracy > 0
    assert found.num_tokens == sum(one.num_tokens for one in single)
    assert found.num_forwards == sum(one.num_forwards for one in single)
    assert found.num_edits == sum(one.num_edits for one in single)
    assert found.num_stopped == sum(one.finish_reason == "stop" for one in single)
    assert found.tokens_per_forward == pytest.approx(found.num_tokens / found.num_forwards)
    assert 0 < found.seconds < 60
    assert (found.task, found.difficulty, found.device) == ("count_on", 1, "cpu")


def test_held_out_problems_are_different_and_nested():
    task = make_task("sudoku")
    problems = held_out_problems(task, 20, 3)
    assert len({problem.prompt for problem in problems}) == 20
    assert all(is_held_out(problem.prompt) for problem in problems)
    assert held_out_problems(task, 5, 3) == problems[:5]
    assert held_out_problems(task, 5, 4) != problems[:5]


def test_a_small_test_split_is_exhausted():
    """150 prompts, of which a sixteenth or so are held out."""
    problems = held_out_problems(CountOn(), 1000)
    assert 4 <= len(problems) < 20
    assert len({problem.prompt for problem in problems}) == len(problems)


def test_numbers():
    scores = (1.0, 0.0, 1.0, 1.0)
    found = result(scores)
    assert (found.n, found.accuracy) == (4, 0.75)
    assert found.stderr == pytest.approx(np.std(scores, ddof=1) / 2)
    assert (found.tokens_per_forward, found.tokens_per_second) == (4, 50)
    assert found.edits_per_token == 0.1
    assert found.to_json()["accuracy"] == 0.75
    assert result((1.0,)).stderr == 0


def test_mean():
    mean = mean_of([result((1.0, 0.0)), result((1.0,) * 4, num_tokens=200, seconds=1.0)])
    assert mean == {
        "task": "mean",
        "n": 6,
        "accuracy": 0.75,
        "stderr": pytest.approx(0.25),
        "tokens_per_forward": 6,
        "tokens_per_second": 125,
        "edits_per_token": pytest.approx(0.075),
    }


def test_errors(chat_llm, llm):
    with pytest.raises(EvalError, match="n = 0 and batch_size = 4 must be at least 1"):
        evaluate(chat_llm, CountOn(), 0)
    with pytest.raises(ChatError, match="has no chat template"):
        evaluate(llm, CountOn(), 1)
