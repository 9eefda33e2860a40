"""Conversations computed from their index."""

import collections
import pickle

import grain
import numpy as np
import pytest

from llada_jax.tasks import TASKS, TaskError, TaskSource, is_held_out


def test_elements_depend_on_seed_and_index_alone():
    one, two = TaskSource(seed=3), TaskSource(seed=3, size=10)
    assert [one[i] for i in (7, 0, 3)] == [two[i] for i in (7, 0, np.int64(3))]
    assert two[-1] == one[9]
    assert pickle.loads(pickle.dumps(one))[5] == one[5]
    assert one[0] != TaskSource(seed=4)[0]
    user, assistant = one[0]["messages"]
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    assert len(one) == 1_000_000
    with pytest.raises(IndexError, match="outside a TaskSource of 10"):
        two[10]


def test_splits():
    train, test = (TaskSource(split=split, size=60) for split in ("train", "test"))
    assert all(is_held_out(test.problem(i)[1].prompt) for i in range(60))
    assert not any(is_held_out(train.problem(i)[1].prompt) for i in range(60))


def test_problems_are_their_tasks():
    source = TaskSource({"addition": 3, "sudoku": 1}, difficulties={"sudoku": [1, 3]}, size=400)
    drawn = [source.problem(i) for i in range(400)]
    assert all(task.score(problem, problem.solution) == 1 for task, problem in drawn)
    counts = collections.Counter((task.name, task.difficulty) for task, _ in drawn)
    assert set(counts) == {("addition", 3), ("sudoku", 1), ("sudoku", 3)}
    assert 270 < counts["addition", 3] < 330
    assert {TaskSource().problem(i)[0].name for i in range(60)} == set(TASKS)


def test_grain_reads_it():
    source = TaskSource(size=5)
    dataset = grain.MapDataset.source(source).shuffle(seed=0)
    assert sorted(map(str, dataset)) == sorted(str(source[i]) for i in range(5))
    assert repr(source) == repr(TaskSource(size=5)) != repr(TaskSource(seed=1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mixture": "sudoko"}, "did you mean 'sudoku'"),
        ({"mixture": {"sudoku": 0}}, "needs positive weights"),
        ({"mixture": []}, "needs positive weights"),
        ({"mixture": ["sudoku"], "difficulties": {"editing": 1}}, "mixture does not hold"),
        ({"difficulties": {"editing": []}}, "give at least one"),
        ({"difficulties": {"editing": 9}}, "to 5 .hard"),
        ({"seed": -1}, "must not be negative"),
        ({"split": "dev"}, "use 'train', 'test' or None"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(TaskError, match=message):
        TaskSource(**arguments)
