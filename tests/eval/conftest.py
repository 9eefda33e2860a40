"""A model that can chat and is right: the counting model, asked to count on."""

import dataclasses
import shutil
from typing import ClassVar

import pytest

from llada_jax import LLM
from llada_jax.tasks import Problem, Task

TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %},{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class CountOn(Task):
    """Four to eight numbers, and five more to write; ``difficulty`` is the step."""

    name: ClassVar[str] = "count_on"
    difficulty: int = 1

    def draw(self, rng):
        start, given = int(rng.integers(10, 40)), int(rng.integers(4, 9))
        numbers = [start + self.difficulty * i for i in range(given + 5)]
        prompt, answer = (",".join(map(str, part)) for part in (numbers[:given], numbers[given:]))
        return Problem(prompt, answer, answer)

    def score(self, problem, text):
        return float(text.startswith(problem.answer))


@pytest.fixture(scope="session")
def chat_folder(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(golden, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def chat_llm(chat_folder):
    return LLM(chat_folder, max_batch_size=4)
