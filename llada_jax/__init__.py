"""LLaDA2.x in JAX: block-diffusion mixture-of-experts language models.

from llada_jax import LLM, SamplingParams

llm = LLM()
chat = [{"role": "user", "content": "Solve 31.2/..13/4321/..3."}]
print(llm.chat(chat, SamplingParams.speed(max_tokens=64))[0].text)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llada_jax.config import ConfigError, ModelConfig
    from llada_jax.decoding import SamplingError, SamplingParams, Trace, TraceStep
    from llada_jax.generation import Generation, StreamEvent
    from llada_jax.llm import LLM
    from llada_jax.request import PromptError

__version__ = "0.1.0"

# Loaded on first use, so that `import llada_jax` and `llada-jax --help` do not wait for jax.
_PUBLIC = {
    "LLM": "llada_jax.llm",
    "SamplingParams": "llada_jax.decoding",
    "SamplingError": "llada_jax.decoding",
    "Generation": "llada_jax.generation",
    "StreamEvent": "llada_jax.generation",
    "Trace": "llada_jax.decoding",
    "TraceStep": "llada_jax.decoding",
    "PromptError": "llada_jax.request",
    "ModelConfig": "llada_jax.config",
    "ConfigError": "llada_jax.config",
}

__all__ = [
    "LLM",
    "ConfigError",
    "Generation",
    "ModelConfig",
    "PromptError",
    "SamplingError",
    "SamplingParams",
    "StreamEvent",
    "Trace",
    "TraceStep",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'llada_jax' has no attribute {name!r}")
