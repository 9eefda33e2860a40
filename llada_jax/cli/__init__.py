"""The command line: ``llada-jax COMMAND``; one file a command."""

from llada_jax.cli.app import main, run_process

__all__ = ["main", "run_process"]
