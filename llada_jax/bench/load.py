"""How fast a checkpoint loads, and how much memory that takes at its worst moment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from llada_jax.checkpoint.keys import hf_names
from llada_jax.checkpoint.safetensors_io import Writer
from llada_jax.checkpoint.staging import write_json
from llada_jax.config import ModelConfig

_CHILD = "import sys; from llada_jax.bench.load import _child; _child(sys.argv[1])"


def bench_load(gigabytes: float = 2.0, merged_experts: bool = False) -> dict[str, int | float]:
    """Imports a made-up checkpoint in a process of its own, on the CPU.

    The checkpoint is bfloat16 and nearly all routed experts (in two layers), so that its weights
    end up in six big arrays. It has just been written: the time is that of a file in the page
    cache.

    Args:
      gigabytes: its size, in 10^9 bytes.
      merged_experts: one tensor for all experts of a layer instead of one an expert.

    Returns:
      ``bytes`` of the files; ``seconds`` of the import; ``peak_rss_bytes``, the largest resident
      memory of the process, pages of mapped files included; ``baseline_rss_bytes``, before the
      import; ``peak_over_size`` and, with the baseline subtracted, ``increase_over_size``.
    """
    with tempfile.TemporaryDirectory(prefix="llada-jax-bench-") as name:
        folder = Path(name)
        config = _config(gigabytes)
        size = write_random(folder, config, merged_experts=merged_experts)
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, name],
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"the import failed: {done.stderr.strip()[-2000:]}")
        result = json.loads(done.stdout.splitlines()[-1])
    peak, baseline = result["peak_rss_bytes"], result["baseline_rss_bytes"]
    return {
        "bytes": size,
        **result,
        "peak_over_size": peak / size,
        "increase_over_size": (peak - baseline) / size,
    }


def write_random(folder: Path, config: ModelConfig, *, merged_experts: bool = False) -> int:
    """Writes a bfloat16 checkpoint of random weights into ``folder`` and returns its size."""
    shapes = hf_names(config, merged_experts)
    dtype = np.dtype("bfloat16")
    noise = np.random.default_rng(0).normal(0, 0.02, 1 << 20).astype(np.float32).astype(dtype)
    write_json(folder / "config.json", config.to_hf())
    file = folder / "model.safetensors"
    with Writer(file, {name: (dtype, shape) for name, shape in shapes.items()}) as writer:
        for name, shape in shapes.items():
            left = int(np.prod(shape))
            for start in range(0, left, noise.size):
                part = noise[: min(noise.size, left - start)]
                writer.write_rows(name, start, part[:, None])  # rows of one element
    return file.stat().st_size


def peak_rss_bytes() -> int:
    """The largest resident memory of this process so far, pages of mapped files included."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _config(gigabytes: float) -> ModelConfig:
    expert = 3 * 1024 * 512 * 2  # bytes
    return ModelConfig(
        vocab_size=1024,
        hidden_size=1024,
        intermediate_size=1024,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=max(8, round(gigabytes * 1e9 / (2 * expert))),
        num_experts_per_tok=8,
        num_shared_experts=1,
        moe_intermediate_size=512,
        first_k_dense_replace=1,
        rotary_dim=32,
        mask_token_id=1023,
        eos_token_ids=(1022,),
        pad_token_id=1022,
    )


def _child(folder: str) -> None:
    import jax
    import jax.numpy as jnp

    from llada_jax.checkpoint.hf import load_hf

    jnp.zeros(1).block_until_ready()
    baseline = peak_rss_bytes()
    start = time.perf_counter()
    _, params = load_hf(folder)
    jax.block_until_ready(params)
    seconds = time.perf_counter() - start
    print(
        json.dumps(
            {
                "seconds": seconds,
                "peak_rss_bytes": peak_rss_bytes(),
                "baseline_rss_bytes": baseline,
            }
        )
    )


if __name__ == "__main__":
    print(json.dumps(bench_load(float(sys.argv[1]) if len(sys.argv) > 1 else 2.0), indent=2))
