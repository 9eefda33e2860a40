"""Every task: what it generates, and what its checker makes of any text."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from llada_jax.tasks import DIFFICULTIES, TASKS, Problem, Task, TaskError, is_held_out, make_task

tasks = st.builds(make_task, st.sampled_from(TASKS), st.sampled_from(DIFFICULTIES))
seeds = st.integers(0, 2**32)
# Text that looks like an answer, and text that does not.
texts = st.text(max_size=60) | st.text("0123456789+-*=/# .\n,abeiko", max_size=60)

EXAMPLES = {
    "addition": Problem("Add 347+285", "7+5=12,4+8+1=13,3+2+1=6\n#### 632", "632"),
    "arithmetic": Problem("Compute 3+4*2-5", "3+8-5\n11-5\n#### 6", "6"),
    "sudoku": Problem("Solve 1..3/..2./.1../4..2", "1243/3421/2134/4312", "1243/3421/2134/4312"),
    "countdown": Problem("Reach 22 with 3 5 7", "3*5+7=22", "3*5+7=22"),
    "editing": Problem("Replace a->o, ki->lu: kafo meki", "kofo melu", "kofo melu"),
}


def draw(task: Task, seed: int, split=None) -> Problem:
    return task.sample(np.random.default_rng(seed), split)


@given(tasks, seeds)
def test_solutions_are_right_short_and_reproducible(task, seed):
    problem = draw(task, seed)
    assert task.score(problem, problem.solution) == 1.0
    assert task.score(problem, f" {problem.solution} \n") == 1.0
    assert problem.answer in problem.solution
    assert len(problem.solution) <= 130
    assert len(problem.prompt) <= 130
    assert (problem.prompt + problem.solution).isascii()
    assert draw(task, seed) == problem


@given(tasks, seeds, texts)
def test_any_text_has_a_score(task, seed, text):
    problem = draw(task, seed)
    assert task.score(problem, text) in (0.0, 1.0)
    assert task.score(problem, f"{problem.solution}{text}") in (0.0, 1.0)
    assert task.score(problem, f"#### {text}") in (0.0, 1.0)


@given(tasks, seeds, st.data())
def test_a_changed_answer_is_wrong(task, seed, data):
    problem = draw(task, seed)
    places = [i for i, character in enumerate(problem.answer) if character.isalnum()]
    if task.name == "countdown":  # 3+3 with one 3 changed to 3 would stay; the target cannot
        places = [i for i in places if i > problem.answer.index("=")]
    at = data.draw(st.sampled_from(places))
    kind = "0123456789" if problem.answer[at].isdigit() else "abcdefghijklmnopqrstuvwxyz"
    other = data.draw(st.sampled_from(kind.replace(problem.answer[at], "")))
    answer = problem.answer[:at] + other + problem.answer[at + 1 :]
    head = problem.solution.removesuffix(problem.answer)
    assert task.score(problem, head + answer) == 0.0
    assert task.score(problem, head) == 0.0


@given(tasks, seeds)
def test_splits_do_not_meet(task, seed):
    assert is_held_out(draw(task, seed, "test").prompt)
    assert not is_held_out(draw(task, seed, "train").prompt)


def test_the_split_never_changes():
    assert [n for n in range(100) if is_held_out(f"Add {n}+1")] == HELD_OUT


HELD_OUT = [12, 29, 30, 46, 50]


@given(tasks, seeds)
def test_prompts_name_their_task(task, seed):
    first = EXAMPLES[task.name].prompt.split()[0]
    assert draw(task, seed).prompt.split()[0] == first
    assert len({example.prompt.split()[0] for example in EXAMPLES.values()}) == len(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_examples(name):
    example = EXAMPLES[name]
    assert make_task(name).score(example, example.solution) == 1.0
    assert example.messages == [
        {"role": "user", "content": example.prompt},
        {"role": "assistant", "content": example.solution},
    ]


@pytest.mark.parametrize(
    ("name", "text", "score"),
    [
        ("addition", "#### 632", 1.0),
        ("addition", "nonsense\n####632", 1.0),
        ("addition", "#### 0632", 0.0),
        ("addition", "#### 632 or so", 0.0),
        ("addition", "632", 0.0),
        ("addition", "#### 632\n#### 633", 0.0),
        ("addition", "#### " + "9" * 10_000, 0.0),
        ("addition", "#### ٦٣٢", 0.0),
        ("sudoku", "my grid\n1243/3421/2134/4312", 1.0),
        ("sudoku", "1243/3421/2134/4321", 0.0),  # not a grid
        ("sudoku", "2143/3421/1234/4312", 0.0),  # a grid, other clues
        ("sudoku", "1243/3421/2134", 0.0),
        ("countdown", "7+5*3 = 22", 1.0),
        ("countdown", "7+3*5", 1.0),
        ("countdown", "3*5+7=21", 0.0),
        ("countdown", "22=3*5+7", 0.0),
        ("countdown", "3*5+7+0=22", 0.0),  # a number that was not given
        ("countdown", "7*3+1=22", 0.0),
        ("countdown", "22", 0.0),
        ("countdown", "__import__('os')", 0.0),
        ("editing", "kofo  melu", 0.0),
        ("editing", "Here: kofo melu", 0.0),
    ],
)
def test_checkers(name, text, score):
    assert make_task(name).score(EXAMPLES[name], text) == score


def test_any_completion_of_a_sudoku_is_right():
    task, problem = make_task("sudoku", 5), Problem("Solve 1.../..../..../....", "", "")
    assert task.score(problem, "1234/3412/2143/4321") == 1.0
    assert task.score(problem, "1243/3421/2134/4312") == 1.0
    assert task.score(problem, "2143/3421/1234/4312") == 0.0


def test_unknown_names_are_errors():
    with pytest.raises(TaskError, match="did you mean 'addition'"):
        make_task("additon")
    with pytest.raises(TaskError, match="known are addition, arithmetic"):
        make_task("xyz")
    with pytest.raises(TaskError, match=r"use 1 \(easy\) to 5 \(hard\)"):
        make_task("sudoku", 6)
    with pytest.raises(TaskError, match="use 'train', 'test' or None"):
        make_task("sudoku").sample(np.random.default_rng(0), "dev")
