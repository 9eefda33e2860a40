"""Every weight of the model, declared once: shape, logical axes, initializer, storage.

Initialisation, shardings, parameter counts and the Hugging Face key table all follow from
``weight_specs``. Weights of the dense layers are stacked on a leading axis ``Ld``, those of the
expert layers on ``Lm``; linear maps are stored ``[in, out]``:

    embed/embedding                      [V, D]
    dense_layers/                        (first_k_dense_replace layers)
      attention_norm/scale               [Ld, D]
      attention/{query,key,value}/kernel [Ld, D, N|K, H]     (bias: [Ld, N|K, H])
      attention/{query_norm,key_norm}/scale   [Ld, H]
      attention/out/kernel               [Ld, N, H, D]       (bias: [Ld, D])
      mlp_norm/scale                     [Ld, D]
      mlp/{gate,up}/kernel               [Ld, D, F], mlp/down/kernel [Ld, F, D]
    moe_layers/                          (the rest; norms and attention as above)
      moe/router/kernel                  [Lm, D, E], moe/router/expert_bias [Lm, E]
      moe/experts/{gate,up}              [Lm, E, D, F], moe/experts/down [Lm, E, F, D]
      moe/shared/{gate,up,down}/kernel   as mlp
    final_norm/scale                     [D]
    lm_head/kernel                       [D, V]              (absent when tied)
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from llada_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Fold:
    """How a weight folds into a stack of matrices ``[*stack, I, O]``, of which I is contracted.

    [Ld, N, H, D], one stack axis, two contracted ones -> [Ld, N*H, D]

    Attributes:
      stack: axes in front that stay as they are.
      contracted: axes after them that an activation is contracted with; the rest make up O.
    """

    stack: int
    contracted: int = 1

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The folded shape."""
        stack, rows, cols = self._parts(shape)
        return (*stack, math.prod(rows), math.prod(cols))

    def axes(self, axes: tuple[Any, ...]) -> tuple[Any, ...]:
        """One name a folded axis: that of the first axis folded into it, the slowest one."""
        stack, rows, cols = self._parts(axes)
        return (*stack, rows[0], cols[0])

    def _parts(self, shape: tuple[Any, ...]) -> tuple[tuple[Any, ...], ...]:
        middle = self.stack + self.contracted
        return shape[: self.stack], shape[self.stack : middle], shape[middle:]


@dataclasses.dataclass(frozen=True)
class WeightSpec:
    """One weight.

    Attributes:
      shape: its shape, the stacked layer axis first where there is one.
      axes: one logical axis a dimension (``parallel/rules.py``).
      init: ``"normal"`` (std ``initializer_range``), ``"ones"`` or ``"zeros"``.
      keep_dtype: the weight keeps its stored precision when a model is cast (the router, whose
        choice of experts must not depend on the compute type).
      fold: how it folds into matrices that can be quantised; ``None`` if it never is
        (``model/quantization.py``).
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Literal["normal", "ones", "zeros"] = "normal"
    keep_dtype: bool = False
    fold: Fold | None = None

    def initialize(self, key: jax.Array, std: float, dtype: Any) -> jax.Array:
        """Draws the weight; ``dtype`` is ignored (float32 instead) where ``keep_dtype`` is set."""
        dtype = jnp.float32 if self.keep_dtype else dtype
        if self.init == "normal":
            return (std * jax.random.normal(key, self.shape, jnp.float32)).astype(dtype)
        return jnp.full(self.shape, 1.0 if self.init == "ones" else 0.0, dtype)


SpecTree = dict[str, Any]  # nested dicts with WeightSpec leaves


def weight_specs(config: ModelConfig) -> SpecTree:
    """The nested dictionary of all weights that ``config`` asks for."""
    c = config
    specs: SpecTree = {
        "embed": {"embedding": WeightSpec((c.vocab_size, c.hidden_size), ("vocab", "embed"))}
    }
    if c.num_dense_layers:
        specs["dense_layers"] = _layer(c, c.num_dense_layers) | {
            "mlp": _mlp(c, c.num_dense_layers, c.intermediate_size)
        }
    if c.num_moe_layers:
        specs["moe_layers"] = _layer(c, c.num_moe_layers) | {"moe": _moe(c, c.num_moe_layers)}
    specs["final_norm"] = {"scale": WeightSpec((c.hidden_size,), ("embed",), "ones")}
    if not c.tie_word_embeddings:
        shape = c.hidden_size, c.vocab_size
        specs["lm_head"] = {"kernel": WeightSpec(shape, ("embed", "vocab"), fold=Fold(0))}
    return specs


def _layer(c: ModelConfig, layers: int) -> SpecTree:
    n, k, h, d = c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.hidden_size

    def scale(size: int, axis: str | None) -> SpecTree:
        return {"scale": WeightSpec((layers, size), ("layers", axis), "ones")}

    def projection(heads: int, axis: str) -> SpecTree:
        axes = ("layers", "embed", axis, "head_dim")
        tree = {"kernel": WeightSpec((layers, d, heads, h), axes, fold=Fold(1))}
        if c.use_qkv_bias:
            tree["bias"] = WeightSpec((layers, heads, h), ("layers", axis, "head_dim"), "zeros")
        return tree

    axes = ("layers", "heads", "head_dim", "embed")
    out = {"kernel": WeightSpec((layers, n, h, d), axes, fold=Fold(1, contracted=2))}
    if c.use_bias:
        out["bias"] = WeightSpec((layers, d), ("layers", "embed"), "zeros")
    return {
        "attention_norm": scale(d, "embed"),
        "attention": {
            "query": projection(n, "heads"),
            "key": projection(k, "kv_heads"),
            "value": projection(k, "kv_heads"),
            "query_norm": scale(h, "head_dim"),
            "key_norm": scale(h, "head_dim"),
            "out": out,
        },
        "mlp_norm": scale(d, "embed"),
    }


def _mlp(c: ModelConfig, layers: int, ffn: int) -> SpecTree:
    d = c.hidden_size
    up = WeightSpec((layers, d, ffn), ("layers", "embed", "mlp"), fold=Fold(1))
    down = WeightSpec((layers, ffn, d), ("layers", "mlp", "embed"), fold=Fold(1))
    return {"gate": {"kernel": up}, "up": {"kernel": up}, "down": {"kernel": down}}


def _moe(c: ModelConfig, layers: int) -> SpecTree:
    d, e, f = c.hidden_size, c.num_experts, c.moe_intermediate_size
    axes = ("layers", "experts", "embed", "expert_mlp")
    up = WeightSpec((layers, e, d, f), axes, fold=Fold(2))
    axes = ("layers", "experts", "expert_mlp", "embed")
    down = WeightSpec((layers, e, f, d), axes, fold=Fold(2))
    tree: SpecTree = {
        "router": {
            "kernel": WeightSpec((layers, d, e), ("layers", "embed", None), keep_dtype=True),
            "expert_bias": WeightSpec((layers, e), ("layers", None), "zeros", keep_dtype=True),
        },
        "experts": {"gate": up, "up": up, "down": down},
    }
    if c.num_shared_experts:
        tree["shared"] = _mlp(c, layers, f * c.num_shared_experts)
    return tree


def flatten_specs(specs: SpecTree, prefix: str = "") -> dict[str, WeightSpec]:
    """``{"embed/embedding": spec, …}`` in declaration order."""
    flat: dict[str, WeightSpec] = {}
    for name, value in specs.items():
        path = f"{prefix}{name}"
        if isinstance(value, WeightSpec):
            flat[path] = value
        else:
            flat.update(flatten_specs(value, path + "/"))
    return flat


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Numbers of weights; ``expert_bias`` is counted apart, as the released index does."""

    total: int
    active: int
    active_without_embedding: int
    expert_bias: int


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Counts the weights of a configuration without allocating any.

    ``active`` counts what one token touches: everything but the routed experts, plus
    ``num_experts_per_tok`` of those in each expert layer.
    """
    total = active = bias = embedding = 0
    for path, spec in flatten_specs(weight_specs(config)).items():
        size = math.prod(spec.shape)
        if path.endswith("/expert_bias"):
            bias += size
            continue
        total += size
        if "/experts/" in path:
            size = size // config.num_experts * config.num_experts_per_tok
        active += size
        if path.startswith(("embed/", "lm_head/")):
            embedding += size
    return ParameterCount(total, active, active - embedding, bias)
