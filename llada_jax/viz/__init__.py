"""Views of a generation: the terminal, and files of recorded steps."""

from llada_jax.viz.escape import escape_controls
from llada_jax.viz.terminal import render_step, replay, watch
from llada_jax.viz.trace_file import read_traces, write_traces

__all__ = ["escape_controls", "read_traces", "render_step", "replay", "watch", "write_traces"]
