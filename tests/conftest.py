"""Every test runs on eight fake CPU devices; most use the first one only."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile far more than they compute: no LLVM optimisation and the old fusion emitters take a
# fraction of the compile time.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_cpu_use_fusion_emitters=false " + os.environ.get("XLA_FLAGS", "")
)
os.environ["LLADA_JAX_COMPILATION_CACHE"] = "off"

from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile("project", deadline=None, derandomize=True)
hypothesis.settings.load_profile("project")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Checkpoint, logits, gradients and decode traces from the released PyTorch code."""
    return Path(__file__).parent / "golden" / "counting"


@pytest.fixture(scope="session")
def counting(golden):
    """The golden checkpoint: ``(model, params)`` in float32."""
    from llada_jax.checkpoint import load_hf
    from llada_jax.model import LLaDA2

    config, params = load_hf(golden)
    return LLaDA2(config), params


@pytest.fixture(scope="session")
def llm():
    """The built-in model behind the sampling API."""
    from llada_jax import LLM

    return LLM("counting")
