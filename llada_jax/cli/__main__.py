"""``python -m llada_jax.cli``."""

from llada_jax.cli.app import run_process

run_process()
