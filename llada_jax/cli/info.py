"""What a configuration describes. No weight is read or allocated.

llada-jax info mini
llada-jax info path/to/model --json
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import jax.numpy as jnp
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llada_jax.cli.output import print_json
from llada_jax.config import ModelConfig
from llada_jax.model import count_parameters, weight_bytes
from pallas_kernels.quantized import SCHEMES

_BIAS_BYTES = 4  # the router's expert bias stays float32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model."""
    parser.add_argument(
        "model", help="a short name (counting, mini, flash), a YAML file, config.json, or a folder"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Prints the summary."""
    described = describe(ModelConfig.from_name(args.model))
    if args.json:
        print_json(described)
        return 0
    Console(highlight=False).print(_table(args.model, described))
    return 0


def describe(config: ModelConfig) -> dict[str, Any]:
    """Sizes of a model.

    ``bytes`` are of the weights in bfloat16 (what the released checkpoints take up) and quantised
    (scales included; what is never quantised in bfloat16). ``cache_bytes_per_token`` is the
    attention memory in bfloat16.
    """
    count = count_parameters(config)
    released = 2 * count.total + _BIAS_BYTES * count.expert_bias
    quantized = {scheme: weight_bytes(config, scheme, jnp.bfloat16) for scheme in SCHEMES}
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    return {
        "parameters": dataclasses.asdict(count),
        "bytes": {"bfloat16": released, **quantized},
        "cache_bytes_per_token": cache,
        "layers": {"dense": config.num_dense_layers, "moe": config.num_moe_layers},
        "config": dataclasses.asdict(config),
    }


def _table(name: str, described: dict[str, Any]) -> Table:
    config, count = described["config"], described["parameters"]
    layers, size = described["layers"], described["bytes"]
    rows = {
        "parameters": _number(count["total"]),
        "active a token": f"{_number(count['active'])} "
        f"({_number(count['active_without_embedding'])} without embeddings)",
        "router bias": _number(count["expert_bias"]),
        "weights": ", ".join(f"{_bytes(count)} in {kind}" for kind, count in size.items()),
        "cache a token": f"{_bytes(described['cache_bytes_per_token'])} in bfloat16",
        "layers": f"{layers['dense']} dense, {layers['moe']} with experts",
        "experts": _experts(config) if layers["moe"] else "none",
        "width": f"{config['hidden_size']}, feed-forward {config['intermediate_size']}, "
        f"expert {config['moe_intermediate_size']}",
        "attention": f"{config['num_attention_heads']} heads of {config['head_dim']}, "
        f"{config['num_key_value_heads']} for keys and values, {config['rotary_dim']} rotated",
        "vocabulary": f"{_number(config['vocab_size'])}, mask {config['mask_token_id']}, "
        f"end {', '.join(map(str, config['eos_token_ids']))}",
        "context": f"{_number(config['max_position_embeddings'])} tokens",
    }
    table = Table(show_header=False, box=None, title=Text(name), title_justify="left")
    for key, value in rows.items():
        table.add_row(key, value)
    return table


def _experts(config: dict[str, Any]) -> str:
    groups = ""
    if config["n_group"] > 1:
        groups = f" from {config['topk_group']} of {config['n_group']} groups"
    return (
        f"{config['num_experts']}, {config['num_experts_per_tok']} a token{groups}, "
        f"{config['num_shared_experts']} shared"
    )


def _number(value: int) -> str:
    return f"{value:,}".replace(",", " ")


def _bytes(count: int) -> str:
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:,.1f} {unit}" if unit != "bytes" else f"{value:.0f} {unit}"
