"""The work on which kernels and stock alternatives are compared: mini's and flash's shapes."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Int


@dataclasses.dataclass(frozen=True)
class Model:
    """The sizes of a model that its kernels see.

    Attributes:
      name: of the model.
      dim: D.
      heads, kv_heads, head_dim: N, K, H.
      experts, experts_per_token, ffn: E, k, F.
      vocabulary: V.
      block: C, tokens decoded together in a row.
    """

    name: str
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    experts_per_token: int
    ffn: int
    vocabulary: int
    block: int


MODELS = {
    "mini": Model("mini", 2048, 16, 4, 128, 256, 8, 512, 157184, 32),
    "flash": Model("flash", 4096, 32, 4, 128, 256, 8, 1024, 157184, 32),
}

ROWS = 8  # decoded together: 256 tokens
CACHE = 4096  # positions a row that the cache has room for
CACHED = 1024  # of which so many are valid in the calls of ``--rows``
TRAINING_LENGTH = 4096

WEIGHTS = ("bfloat16", "int8", "fp8", "int4")


def ragged_lengths(capacity: int = CACHE, block: int = 32) -> Int[np.ndarray, " lengths"]:
    """All cache lengths of whole blocks from an eighth of the room on, with room for one more.

    Figures are means over them: a sample of a few rows would say more about the sample, since what
    a row costs depends on how its length divides into tiles.
    """
    return np.arange(capacity // 8, capacity, block, dtype=np.int32)


def routing(model: Model, tokens: int, seed: int = 0) -> Int[np.ndarray, "M k"]:
    """Experts of each token: k different ones, all equally likely, independent of other tokens.

    A trained router's choices are neither uniform nor independent: it touches fewer experts.
    """
    order = np.random.default_rng(seed).random((tokens, model.experts)).argsort(-1)
    return order[:, : model.experts_per_token].astype(np.int32)
