"""How far two models agree: both read the same tokens, block-causally and without a cache.

  llada-jax verify original converted
  llada-jax verify original quantised --prompt-file texts.txt --max-kl 0.05
  llada-jax verify original original --quantization int8

Exits with 1 if the mean KL divergence is above --max-kl.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from rich.console import Console
from rich.table import Table

from llada_jax.checkpoint import Agreement, compare
from llada_jax.cli.models import add_dtype_argument, add_quantization_argument, open_model
from llada_jax.cli.output import print_json
from llada_jax.cli.parser import UsageError, positive_int
from llada_jax.config import ModelConfig
from llada_jax.llm import LLM
from llada_jax.model import LLaDA2
from pallas_kernels import block_causal

_BLOCK_LENGTH = 32
_MASKED_SHARE = 0.3
_ROW = 128  # random tokens are read in rows of this length


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The models, and what they read."""
    parser.add_argument("a", metavar="A", help="the reference: folder, hub id or built-in model")
    parser.add_argument("b", metavar="B", help="the model under test")
    parser.add_argument("--prompt-file", type=Path, metavar="F", help="a file, a text a line")
    parser.add_argument(
        "--tokens",
        type=positive_int,
        default=512,
        metavar="N",
        help="random tokens to read if there is no --prompt-file (default 512)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of random tokens and masks")
    parser.add_argument(
        "--max-kl", type=float, default=0.015, help="tolerated mean KL in nats (default 0.015)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_dtype_argument(parser)
    add_quantization_argument(parser, what="quantise the weights of B while loading")


@dataclasses.dataclass(frozen=True)
class Rows:
    """What both models read.

    Attributes:
      tokens: ``[R, T]``, T a whole number of blocks; rows end with masks, like a draft.
      compared: ``[R, T]``: the positions that count.
    """

    tokens: np.ndarray
    compared: np.ndarray


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What a model says at the compared positions, P of them: ``[P, V]``; layers: ``[P, D]``."""

    logits: np.ndarray
    layers: list[np.ndarray]


def run(args: argparse.Namespace) -> int:
    """Compares and prints. One model is in memory at a time."""
    if args.seed < 0:
        raise UsageError(f"--seed {args.seed} must not be negative")
    llm = open_model(args.a, args.dtype)
    config = llm.config
    rows = _read_rows(llm, args)
    outputs_a = run_model(llm, rows)
    del llm
    llm = open_model(args.b, args.dtype, quantization=args.quantization)
    _check_comparable(config, llm.config)
    outputs_b = run_model(llm, rows)
    same_layers = [h.shape for h in outputs_a.layers] == [h.shape for h in outputs_b.layers]
    agreement = compare(
        outputs_a.logits,
        outputs_b.logits,
        hidden_a=outputs_a.layers if same_layers else (),
        hidden_b=outputs_b.layers if same_layers else (),
    )
    agrees = agreement.mean_kl <= args.max_kl
    if args.json:
        print_json({"agrees": agrees, "max_allowed_kl": args.max_kl, **vars(agreement)})
    else:
        _print(agreement, args.max_kl)
    return 0 if agrees else 1


def _read_rows(llm: LLM, args: argparse.Namespace) -> Rows:
    config = llm.config
    generator = np.random.default_rng(args.seed)
    if args.prompt_file is None:
        return random_rows(config, args.tokens, generator)
    if llm.tokenizer is None:
        raise UsageError(f"{args.a} has no tokenizer; leave --prompt-file out for random tokens")
    try:
        lines = args.prompt_file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"{args.prompt_file} is not UTF-8 text: {error}") from error
    limit = config.max_position_embeddings // _BLOCK_LENGTH * _BLOCK_LENGTH
    texts = [llm.tokenizer.encode(line)[:limit] for line in lines if line.strip()]
    if not texts:
        raise UsageError(f"{args.prompt_file} holds no text; write one a line")
    return masked_rows(texts, config.mask_token_id, generator)


def random_rows(config: ModelConfig, count: int, generator: np.random.Generator) -> Rows:
    """``count`` tokens drawn from the vocabulary, some of them masked."""
    tokens = generator.integers(0, config.vocab_size, count)
    limit = max(1, min(_ROW, config.max_position_embeddings))
    rows = [tokens[i : i + limit].tolist() for i in range(0, count, limit)]
    return masked_rows(rows, config.mask_token_id, generator)


def masked_rows(
    sequences: list[list[int]], mask_token_id: int, generator: np.random.Generator
) -> Rows:
    """Masks a share of each sequence and fills all up to one whole number of blocks."""
    blocks = max(-(-len(sequence) // _BLOCK_LENGTH) for sequence in sequences)
    shape = len(sequences), blocks * _BLOCK_LENGTH
    tokens = np.full(shape, mask_token_id, np.int32)
    compared = np.zeros(shape, bool)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = sequence
        compared[row, : len(sequence)] = True
    tokens[generator.random(shape) < _MASKED_SHARE] = mask_token_id
    return Rows(tokens, compared)


def run_model(llm: LLM, rows: Rows) -> Outputs:
    """One forward pass a row; results on the host."""
    logits, layers = [], []
    for tokens, compared in zip(rows.tokens, rows.compared, strict=True):
        row_logits, row_layers = jax.device_get(
            _forward(llm.denoiser.model, llm.params, tokens[None])
        )
        logits.append(row_logits[compared])
        layers.append(row_layers[:, compared])
    return Outputs(np.concatenate(logits), list(np.concatenate(layers, axis=1)))


@functools.partial(jax.jit, static_argnums=0)
def _forward(
    model: LLaDA2, params: Any, tokens: Int[Array, "1 T"]
) -> tuple[Float[Array, "T V"], Float[Array, "layers T D"]]:
    span = jnp.arange(tokens.shape[1])
    mask = block_causal(span[:, None], span[None, :], _BLOCK_LENGTH)[None]
    out: Any = model.apply({"params": params}, tokens, mask=mask, return_layers=True)
    logits = model.apply({"params": params}, out.hidden, method="logits")
    return logits[0], out.layers[:, 0].astype(jnp.float32)


def _check_comparable(a: ModelConfig, b: ModelConfig) -> None:
    for field in ("vocab_size", "mask_token_id"):
        if getattr(a, field) != getattr(b, field):
            raise UsageError(
                f"the models cannot be compared: {field} is {getattr(a, field)} in A and "
                f"{getattr(b, field)} in B"
            )


def _print(agreement: Agreement, max_kl: float) -> None:
    table = Table(show_header=False, box=None)
    verdict = "agree" if agreement.mean_kl <= max_kl else "DIFFER"
    for name, value in {
        "positions": str(agreement.positions),
        "mean KL(A || B)": f"{agreement.mean_kl:.3e} nats; at most {max_kl:g} allowed: {verdict}",
        "largest KL": f"{agreement.max_kl:.3e} nats",
        "largest logit difference": f"{agreement.max_logit_difference:.3e}",
        "top-1 agreement": f"{agreement.top1:.2%}",
        "B's best in A's top 5": f"{agreement.top5:.2%}",
    }.items():
        table.add_row(name, value)
    for layer, drift in enumerate(agreement.layer_drift):
        table.add_row(f"drift after layer {layer}", f"{drift:.3e}")
    if not agreement.layer_drift:
        table.add_row("drift", "not comparable: the layers differ in number or width")
    Console(highlight=False).print(table)
