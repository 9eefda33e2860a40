import io

import pytest

from llada_jax.cli import main


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs a command: ``(exit code, stdout, stderr)``. The default model is ``counting`` here."""
    monkeypatch.setattr("llada_jax.llm.BUILTIN_MODELS", ("counting", "nano"))

    def call(*arguments: str, stdin: str = ""):
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        capsys.readouterr()
        code = main(list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
