"""Sudoku of 4 by 4: every row, column and 2 by 2 box holds 1, 2, 3 and 4.

Solve 1..3/..2./.1../4..2
1243/3421/2134/4312
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from typing import ClassVar

import numpy as np

from llada_jax.tasks.problem import Problem, Task, TaskError, last_line

HOLES = {1: 4, 2: 6, 3: 8, 4: 10, 5: 12}  # of 16 cells, by difficulty

_GRID = re.compile(r"[1-4]{4}(?:/[1-4]{4}){3}")
_BOX = np.arange(16).reshape(2, 2, 2, 2).transpose(0, 2, 1, 3).reshape(4, 4)
_UNITS = np.concatenate([np.arange(16).reshape(4, 4), np.arange(16).reshape(4, 4).T, _BOX])


@dataclasses.dataclass(frozen=True)
class Sudoku(Task):
    """4, 6, 8, 10 or 12 holes.

    Up to 10 holes the solution is unique. With 12 it seldom is; any completion of the clues is
    right, at every difficulty.
    """

    name: ClassVar[str] = "sudoku"
    difficulty: int = 2

    def draw(self, rng: np.random.Generator) -> Problem:
        """Draws one of the 288 grids and digs holes into it."""
        grids = all_grids()
        holes = HOLES[self.difficulty]
        while True:
            grid = grids[rng.integers(len(grids))]
            shown = np.ones(16, bool)
            shown[rng.permutation(16)[:holes]] = False
            unique = (grids[:, shown] == grid[shown]).all(axis=1).sum() == 1
            if unique or holes > 10:
                break
        clues = "".join(str(cell) if show else "." for cell, show in zip(grid, shown, strict=True))
        answer = _rows("".join(map(str, grid)))
        return Problem(f"Solve {_rows(clues)}", answer, answer)

    def score(self, problem: Problem, text: str) -> float:
        """1.0 if the last line is a valid grid that keeps the clues."""
        line = last_line(text)
        if not _GRID.fullmatch(line):
            return 0.0
        clues = problem.prompt.removeprefix("Solve ").replace("/", "")
        if len(clues) != 16:
            raise TaskError(f"{problem.prompt!r} is no sudoku problem; score it with its own task")
        cells = line.replace("/", "")
        kept = all(clue in (".", cell) for clue, cell in zip(clues, cells, strict=True))
        return float(kept and is_valid(np.array([int(cell) for cell in cells])))


def is_valid(cells: np.ndarray) -> bool:
    """Whether 16 full cells, row by row, make a sudoku."""
    return bool((np.sort(cells[_UNITS], axis=1) == np.arange(1, 5)).all())


@functools.cache
def all_grids() -> np.ndarray:
    """All 288 grids, as rows of 16 cells."""
    rows = list(itertools.permutations((1, 2, 3, 4)))
    pairs = [  # bands of two rows whose columns and boxes do not repeat
        (*a, *b) for a, b in itertools.product(rows, repeat=2) if not {a[0], a[1]} & {b[0], b[1]}
    ]
    bands = itertools.product(pairs, repeat=2)
    return np.array([(*a, *b) for a, b in bands if is_valid(np.array((*a, *b)))], np.int8)


def _rows(cells: str) -> str:
    """Sixteen characters as four rows."""
    return "/".join(cells[i : i + 4] for i in range(0, 16, 4))
