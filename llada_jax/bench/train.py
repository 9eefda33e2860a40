"""Training speed, and the memory of the chunked loss against the naive one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from llada_jax.config import ModelConfig
from llada_jax.diffusion import DiffusionConfig, HeadStats, head_stats
from llada_jax.model import LLaDA2
from llada_jax.model.layers import precision_of
from llada_jax.parallel import make_mesh
from llada_jax.training.config import TrainSection
from llada_jax.training.flops import flops_per_clean_token, measured_peak_flops
from llada_jax.training.optimizer import make_optimizer
from llada_jax.training.state import new_state, state_shardings
from llada_jax.training.step import batch_sharding, make_step

_SUPERVISED = 0.6  # of the tokens; the rest is prompt
_DOCUMENT = 64  # tokens


def bench_train(
    model: str = "nano",
    batch: int = 32,
    length: int = 64,
    rounds: int = 2,
    steps: int = 5,
    *,
    mixed_precision: bool = False,
    loss_length: int = 4096,
    report: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Times compiled steps on random tokens, noise and update included.

    Args:
      model: a short name, YAML file or folder: the shape.
      batch: rows a step.
      length: tokens a row; documents of 64 tokens are packed into it.
      rounds: of the multi-turn forward.
      steps: how many to time; the median counts.
      mixed_precision: bfloat16 activations.
      loss_length: tokens for the memory comparison, with mini's width and vocabulary.
      report: is told what goes on.

    Returns:
      A JSON object: ``clean_tokens_per_second``, ``mfu`` (of ``peak_flops``, a large matrix
      product measured on the same device), and under ``loss_memory`` what XLA reserves for the
      loss and its gradient.
    """
    config = ModelConfig.from_name(model)
    diffusion = DiffusionConfig(rounds=rounds)
    train = TrainSection("unused", max_steps=1000, enable_mixed_precision=mixed_precision)
    dtype = jnp.bfloat16 if mixed_precision else jnp.float32
    network = LLaDA2(config, dtype=dtype)
    mesh = make_mesh(devices=jax.devices()[:1])
    optimizer = make_optimizer(train, 1000)
    shardings = state_shardings(config, optimizer, mesh)
    report("compiling a training step")
    state = new_state(network.init_params(jax.random.key(0)), optimizer, 0, shardings)
    step = make_step(network, diffusion, train, optimizer, shardings, mesh)
    rows = jax.device_put(_rows(config, batch, length), batch_sharding(mesh))
    state, metrics = step(state, rows)
    jax.block_until_ready(metrics)
    report(f"timing {steps} steps")
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        state, metrics = step(state, rows)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    peak = measured_peak_flops(dtype)
    speed = batch * length / statistics.median(seconds)
    document = min(_DOCUMENT, length)
    needed = flops_per_clean_token(config, diffusion, float(document), _SUPERVISED)
    report("compiling the loss, chunked and naive")
    return {
        "device": jax.devices()[0].device_kind,
        "model": model,
        "dtype": jnp.dtype(dtype).name,
        "batch": batch,
        "length": length,
        "rounds": rounds,
        "seconds_per_step": statistics.median(seconds),
        "clean_tokens_per_second": speed,
        "flops_per_clean_token": needed,
        "peak_flops": peak,
        "mfu": speed * needed / peak,
        "loss_memory": loss_memory(loss_length),
    }


def loss_memory(
    length: int = 4096, width: int = 2048, vocabulary: int = 157184, chunk: int = 128
) -> dict[str, Any]:
    """Bytes that XLA reserves for the loss and its gradient beside inputs and results.

    Compiled, not run: mini's head on one row of ``length`` tokens, float32, every
    token supervised.
    """
    shapes = (
        jax.ShapeDtypeStruct((1, length, width), jnp.float32),
        jax.ShapeDtypeStruct((width, vocabulary), jnp.float32),
        jax.ShapeDtypeStruct((1, length), jnp.int32),
    )

    def chunked(hidden: Array, kernel: Array, labels: Array) -> Array:
        needed = jnp.ones(labels.shape, bool)
        stats: HeadStats = head_stats(hidden, kernel, labels, needed, 0, 1.0, chunk, False)
        return -stats.log_prob.mean()

    def naive(hidden: Array, kernel: Array, labels: Array) -> Array:
        scores = jnp.einsum("bld,dv->blv", hidden, kernel, precision=precision_of(hidden.dtype))
        log_p = jax.nn.log_softmax(scores.astype(jnp.float32), axis=-1)
        return -jnp.take_along_axis(log_p, labels[..., None], axis=-1).mean()

    def reserved(loss: Callable[..., Array]) -> int:
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()
        analysis: Any = compiled.memory_analysis()
        return int(analysis.temp_size_in_bytes)

    ours, theirs = reserved(chunked), reserved(naive)
    return {
        "tokens": length,
        "vocabulary": vocabulary,
        "chunk": chunk,
        "chunked_bytes": ours,
        "naive_bytes": theirs,
        "ratio": theirs / ours,
    }


def _rows(config: ModelConfig, batch: int, length: int) -> dict[str, np.ndarray]:
    """One micro-batch [1, B, L] of packed random documents."""
    document = min(_DOCUMENT, length)
    index = np.arange(length)
    rng = np.random.default_rng(0)
    prompt = round(document * (1 - _SUPERVISED))
    whole = {
        "tokens": rng.integers(0, config.vocab_size, (batch, length)).astype(np.int32),
        "positions": np.broadcast_to(index % document, (batch, length)).astype(np.int32),
        "document": np.broadcast_to(1 + index // document, (batch, length)).astype(np.int32),
        "supervised": np.broadcast_to(index % document >= prompt, (batch, length)),
    }
    return {name: np.ascontiguousarray(x)[None] for name, x in whole.items()}
