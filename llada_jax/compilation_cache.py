"""XLA's compilation cache on disk, on by default: a program compiles once a machine."""

from __future__ import annotations

import os
from pathlib import Path

import jax

VARIABLE = "LLADA_JAX_COMPILATION_CACHE"


def enable_compilation_cache() -> None:
    """Points jax to a folder of compiled programs, unless it has one already.

    The folder is ``$LLADA_JAX_COMPILATION_CACHE``, or ``llada_jax/xla`` in the user's cache
    folder; ``LLADA_JAX_COMPILATION_CACHE=off`` leaves the cache off.
    """
    choice = os.environ.get(VARIABLE, "")
    if choice.lower() in ("off", "0", "false") or jax.config.values["jax_compilation_cache_dir"]:
        return
    if choice:
        folder = Path(choice)
    else:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(home) / "llada_jax" / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # a read-only home is no reason to fail
    jax.config.update("jax_compilation_cache_dir", str(folder))
