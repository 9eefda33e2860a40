"""The least time of one decoding forward on a TPU: bytes over bandwidth, FLOPs over peak.

Arithmetic on shapes and on the chips' public figures; nothing is run. With the kernels' report the
bundles that the compiler scheduled for our kernels stand beside it, turned into time by the clock.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from llada_jax.config import ModelConfig
from llada_jax.model import flatten_specs, weight_specs
from llada_jax.model.quantization import quantized_shape, weight_bytes, weight_scheme
from pallas_kernels.chips import CHIPS, Chip

SCHEMES = ("bfloat16", "int8", "fp8", "int4")

# Tokens a forward, speed and quality mode, as LLaDA2.1 reports them (mean of 33 tasks).
REPORTED_TPF = {"mini": {"speed": 5.34, "quality": 3.12}, "flash": {"speed": 5.93, "quality": 3.64}}

_USABLE = 0.9  # of the memory: the rest is the runtime's and the program's own arrays
_COMPILED_BATCH = 8  # the rows that the kernels' report compiles for


@dataclasses.dataclass(frozen=True)
class Work:
    """What one forward of a batch of blocks needs: arithmetic.

    Attributes:
      weight_bytes: read, of the experts the touched ones alone.
      cache_bytes: keys and values read, and those of the block written.
      resident_bytes: all weights and the cache.
      touched_experts: a layer, expected.
      flops: of the products.
    """

    weight_bytes: int
    cache_bytes: int
    resident_bytes: int
    touched_experts: float
    flops: int


def touched_experts(config: ModelConfig, tokens: int) -> float:
    """Expected number of experts in use, a layer, if each token chose k of E at random.

    ``E (1 - (1 - k / E) ** M)``. Real routing differs: neighbouring tokens, and masks above all,
    choose alike, so fewer experts are touched.
    """
    e, k = config.num_experts, config.num_experts_per_tok
    return e * (1 - (1 - k / e) ** tokens) if e else 0.0


def work(
    config: ModelConfig, batch: int, block: int, cache_length: int, scheme: str = "bfloat16"
) -> Work:
    """Bytes and FLOPs of one forward.

    Args:
      config: the model.
      batch: rows.
      block: tokens a row that are decoded together.
      cache_length: cached positions a row, bfloat16.
      scheme: of the weights: ``"bfloat16"`` or a quantisation.
    """
    quantization = None if scheme == "bfloat16" else scheme
    tokens = batch * block
    touched = touched_experts(config, tokens)
    read = used = 0.0
    for path, spec in flatten_specs(weight_specs(config)).items():
        name = weight_scheme(path, spec, quantization)
        if name is not None:
            size = quantized_shape(spec, name).nbytes
        else:
            size = math.prod(spec.shape) * (4 if spec.keep_dtype else 2)
        entries = math.prod(spec.shape)
        if path.startswith("embed/"):
            size = tokens * config.hidden_size * 2
            entries = entries if config.tie_word_embeddings else 0
            if config.tie_word_embeddings:
                size += math.prod(spec.shape) * 2
        elif "/experts/" in path:
            size *= touched / config.num_experts
            entries *= config.num_experts_per_tok / config.num_experts
        read += size
        used += entries
    heads = config.num_attention_heads * config.head_dim
    layers = config.num_hidden_layers
    a_token = 2 * layers * config.num_key_value_heads * config.head_dim * 2
    attention = 4 * tokens * heads * (cache_length + block) * layers
    return Work(
        weight_bytes=round(read),
        cache_bytes=batch * (cache_length + block) * a_token,
        resident_bytes=weight_bytes(config, quantization, jnp.bfloat16)
        + batch * (cache_length + block) * a_token,
        touched_experts=touched,
        flops=round(2 * tokens * used + attention),
    )


def bench_roofline(
    model: str = "mini",
    batches: Sequence[int] = (1, 8, 32),
    schemes: Sequence[str] = SCHEMES,
    chips: Sequence[str] = tuple(CHIPS),
    cache_length: int = 1024,
    block: int = 32,
    kernels: Sequence[Mapping[str, Any]] = (),
) -> list[dict[str, Any]]:
    """A row for each chip, scheme and batch.

    Args:
      model: a name of ``configs/model``.
      batches, schemes, chips: what to combine.
      cache_length: cached positions a row.
      block: tokens of a block.
      kernels: entries of ``python -m pallas_kernels.report --json``.

    Returns:
      ``arithmetic``: bytes, FLOPs, ``bound`` (what takes longer), the upper limit of forwards a
      second and, at the reported tokens a forward, of tokens a second over the whole batch, and
      whether weights and cache fit 90 % of the device's memory. ``compiler`` is ``None``, or, for
      8 rows in bfloat16 with ``kernels``: seconds that one core needs to issue the bundles of our
      kernels in all layers, and the time of their bytes; the rest of the model is not in it.
    """
    config = ModelConfig.from_name(model)
    rows = []
    for name in chips:
        for scheme in schemes:
            for batch in batches:
                needed = work(config, batch, block, cache_length, scheme)
                compiled = None
                if batch == _COMPILED_BATCH and scheme == "bfloat16":
                    compiled = kernel_seconds(config, model, CHIPS[name], kernels)
                rows.append(
                    {
                        "model": model,
                        "chip": name,
                        "weights": scheme,
                        "batch": batch,
                        "cache_length": cache_length,
                        "arithmetic": _limits(model, CHIPS[name], needed, batch),
                        "compiler": compiled,
                    }
                )
    return rows


def _limits(model: str, chip: Chip, needed: Work, batch: int) -> dict[str, Any]:
    moved = needed.weight_bytes + needed.cache_bytes
    memory, compute = moved / chip.bandwidth, needed.flops / chip.bf16_flops
    forwards = 1 / max(memory, compute)
    return {
        **dataclasses.asdict(needed),
        "bytes": moved,
        "memory_seconds": memory,
        "compute_seconds": compute,
        "bound": "memory" if memory >= compute else "compute",
        "forwards_per_second": forwards,
        "tokens_per_second": {
            mode: forwards * batch * tpf for mode, tpf in REPORTED_TPF.get(model, {}).items()
        },
        "fits": needed.resident_bytes <= _USABLE * chip.hbm_gib * 2**30,
    }


def kernel_seconds(
    config: ModelConfig, model: str, chip: Chip, kernels: Sequence[Mapping[str, Any]]
) -> dict[str, float] | None:
    """Time of our kernels in all layers, by their bundles and by their bytes.

    Args:
      config, model: the model and its name.
      chip: where.
      kernels: the report's entries.
    """
    calls = {
        "block_decode_attention": config.num_hidden_layers,
        "expert_mlp": config.num_moe_layers,
        "confidence_head": 1,
    }
    issue = copy = bound = 0.0
    for kernel, count in calls.items():
        mine = [
            e
            for e in kernels
            if (e["kernel"], e["chip"]) == (kernel, chip.name) and e["shape"].startswith(model)
        ]
        if not mine:
            return None
        issued = mine[0]["bundles"] / chip.clock_hz
        copied = mine[0]["hbm_bytes"] / chip.bandwidth
        issue += count * issued
        copy += count * copied
        bound += count * max(issued, copied)
    return {"issue_seconds": issue, "copy_seconds": copy, "bound_seconds": bound}
