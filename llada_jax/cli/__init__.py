"""The command line: ``llada-jax COMMAND``; one file a command."""

from llada_jax.cli.app import main

__all__ = ["main"]
