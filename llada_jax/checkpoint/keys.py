"""The key table: which Hugging Face tensor holds which weight, and in what layout.

One row a weight, read in both directions: ``load_hf`` and ``save_hf`` both walk ``pieces``. A
layout reads like einops, Hugging Face on the left and ours on the right, layer and expert axes
left out:

    "(N H) D -> D N H"   stored [N*H, D] there, transposed and split into [D, N, H] here

Rows of the table that share a tensor name share the tensor, one below the other in the order of
the table:

    attention.query_key_value.weight  [(N + 2K) * H, D]
      ├ rows of the N query heads  -> attention/query/kernel
      ├ rows of the K key heads    -> attention/key/kernel
      └ rows of the K value heads  -> attention/value/kernel

Merged experts (the training layout) are the same thing: expert ``e`` is rows ``e*F … (e+1)*F`` of
one tensor ``[E, F, D]``.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterable

from llada_jax.config import ModelConfig
from llada_jax.model.weights import flatten_specs, weight_specs


@dataclasses.dataclass(frozen=True)
class KeyRule:
    """One row of the table.

    Attributes:
      path: path in our tree; ``{stack}`` stands for ``dense_layers`` and ``moe_layers``.
      name: the tensor's Hugging Face name, with ``{layer}`` and ``{expert}``.
      layout: Hugging Face axes ``->`` our axes, without layers and experts.
      merged: the name in the merged expert layout, if it has one.
    """

    path: str
    name: str
    layout: str
    merged: str | None = None

    def matrix(self, block: tuple[int, ...]) -> tuple[tuple[int, ...], bool, int]:
        """How a block of our shape ``block`` is stored.

        Returns:
          Its Hugging Face shape; whether it is transposed; how many of our axes make up the first
          side of our matrix (the others are the second side).
        """
        theirs, ours = (side.strip() for side in self.layout.split("->"))
        sizes = dict(zip(ours.split(), block, strict=True))
        groups = [g.strip("()").split() for g in re.findall(r"\([^)]*\)|\w+", theirs)]
        shape = tuple(math.prod(sizes[letter] for letter in group) for group in groups)
        transposed = ours.split()[0] != groups[0][0]
        return shape, transposed, len(groups[-1] if transposed else groups[0])

    @property
    def rank(self) -> int:
        """Dimensions of our block: those of the weight without layers and experts."""
        return len(self.layout.split("->")[1].split())


_LAYER = "model.layers.{layer}."
_ATTENTION = _LAYER + "attention."
_QKV = _ATTENTION + "query_key_value."
_MLP = _LAYER + "mlp."
_EXPERT = _MLP + "experts.{expert}."
_MERGED = _MLP + "experts."
_SHARED = _MLP + "shared_experts."

TABLE: tuple[KeyRule, ...] = (
    KeyRule("embed/embedding", "model.word_embeddings.weight", "V D -> V D"),
    KeyRule("{stack}/attention_norm/scale", _LAYER + "input_layernorm.weight", "D -> D"),
    KeyRule("{stack}/attention/query/kernel", _QKV + "weight", "(N H) D -> D N H"),
    KeyRule("{stack}/attention/key/kernel", _QKV + "weight", "(K H) D -> D K H"),
    KeyRule("{stack}/attention/value/kernel", _QKV + "weight", "(K H) D -> D K H"),
    KeyRule("{stack}/attention/query/bias", _QKV + "bias", "(N H) -> N H"),
    KeyRule("{stack}/attention/key/bias", _QKV + "bias", "(K H) -> K H"),
    KeyRule("{stack}/attention/value/bias", _QKV + "bias", "(K H) -> K H"),
    KeyRule("{stack}/attention/query_norm/scale", _ATTENTION + "query_layernorm.weight", "H -> H"),
    KeyRule("{stack}/attention/key_norm/scale", _ATTENTION + "key_layernorm.weight", "H -> H"),
    KeyRule("{stack}/attention/out/kernel", _ATTENTION + "dense.weight", "D (N H) -> N H D"),
    KeyRule("{stack}/attention/out/bias", _ATTENTION + "dense.bias", "D -> D"),
    KeyRule("{stack}/mlp_norm/scale", _LAYER + "post_attention_layernorm.weight", "D -> D"),
    KeyRule("dense_layers/mlp/gate/kernel", _MLP + "gate_proj.weight", "F D -> D F"),
    KeyRule("dense_layers/mlp/up/kernel", _MLP + "up_proj.weight", "F D -> D F"),
    KeyRule("dense_layers/mlp/down/kernel", _MLP + "down_proj.weight", "D F -> F D"),
    KeyRule("moe_layers/moe/router/kernel", _MLP + "gate.weight", "E D -> D E"),
    KeyRule("moe_layers/moe/router/expert_bias", _MLP + "gate.expert_bias", "E -> E"),
    KeyRule(
        "moe_layers/moe/experts/gate",
        _EXPERT + "gate_proj.weight",
        "F D -> D F",
        merged=_MERGED + "gate_proj",
    ),
    KeyRule(
        "moe_layers/moe/experts/up",
        _EXPERT + "up_proj.weight",
        "F D -> D F",
        merged=_MERGED + "up_proj",
    ),
    KeyRule(
        "moe_layers/moe/experts/down",
        _EXPERT + "down_proj.weight",
        "D F -> F D",
        merged=_MERGED + "down_proj",
    ),
    KeyRule("moe_layers/moe/shared/gate/kernel", _SHARED + "gate_proj.weight", "F D -> D F"),
    KeyRule("moe_layers/moe/shared/up/kernel", _SHARED + "up_proj.weight", "F D -> D F"),
    KeyRule("moe_layers/moe/shared/down/kernel", _SHARED + "down_proj.weight", "D F -> F D"),
    KeyRule("final_norm/scale", "model.norm.weight", "D -> D"),
    KeyRule("lm_head/kernel", "lm_head.weight", "V D -> D V"),
)

_RULES: dict[str, KeyRule] = {
    rule.path.format(stack=stack): rule
    for rule in TABLE
    for stack in ("dense_layers", "moe_layers")
}


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """One block of one weight, and the rows of the tensor that hold it.

    The tensor is looked at as a matrix ``[all rows, cols]`` (a vector has one column).

    Attributes:
      path: path of the weight in our tree.
      lead: index of the block in the weight's stacked axes: ``()``, ``(layer,)`` counted within
        its stack, or ``(layer, expert)``.
      name: the tensor's Hugging Face name.
      shape: the whole tensor's shape.
      start: first row of the block in the tensor.
      rows, cols: size of the block as it is stored.
      transposed: our block, flattened to a matrix, is ``[cols, rows]`` instead.
      split: how many of our block's axes make up the first side of that matrix.
    """

    path: str
    lead: tuple[int, ...]
    name: str
    shape: tuple[int, ...]
    start: int
    rows: int
    cols: int
    transposed: bool
    split: int


@functools.lru_cache(maxsize=8)
def pieces(config: ModelConfig, merged_experts: bool = False) -> dict[str, tuple[Piece, ...]]:
    """All blocks of all weights: ``{path: pieces}``, paths in the order of ``weight_specs``.

    Args:
      config: the model.
      merged_experts: one tensor for all experts of a layer instead of one an expert.
    """
    specs = flatten_specs(weight_specs(config))
    paths = sorted(specs, key=list(_RULES).index)  # tensors are shared in the table's order
    layouts = {}
    height: collections.Counter[tuple[str, str]] = collections.Counter()  # rows of a tensor, so far
    above: dict[str, int] = {}  # rows of its tensor that belong to earlier paths
    for path in paths:
        rule, shape = _RULES[path], specs[path].shape
        lead = shape[: len(shape) - rule.rank]
        layouts[path] = (lead, *rule.matrix(shape[len(lead) :]))
        matrix = layouts[path][1]
        above[path] = height[path.split("/")[0], rule.name]
        height[path.split("/")[0], rule.name] += matrix[0]
    out: dict[str, tuple[Piece, ...]] = {}
    for path in specs:
        rule = _RULES[path]
        lead, matrix, transposed, split = layouts[path]
        merged = merged_experts and rule.merged is not None
        name = rule.merged if merged and rule.merged else rule.name
        rows, cols = matrix[0], math.prod(matrix[1:])
        shape = (height[path.split("/")[0], rule.name], *matrix[1:])
        if merged:
            shape = (lead[1], *shape)
        first_layer = config.num_dense_layers if path.startswith("moe_layers/") else 0
        out[path] = tuple(
            Piece(
                path,
                index,
                _format(name, index, first_layer),
                shape,
                index[1] * rows if merged else above[path],
                rows,
                cols,
                transposed,
                split,
            )
            for index in _indices(lead)
        )
    return out


def _indices(lead: tuple[int, ...]) -> Iterable[tuple[int, ...]]:
    """All indices into the stacked axes, the last axis fastest."""
    if not lead:
        return [()]
    return [(*head, i) for head in _indices(lead[:-1]) for i in range(lead[-1])]


def _format(name: str, index: tuple[int, ...], first_layer: int) -> str:
    layer = index[0] + first_layer if index else 0
    return name.format(layer=layer, expert=index[1] if len(index) > 1 else 0)


def hf_names(config: ModelConfig, merged_experts: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a checkpoint, embedding first, then layer by layer.

    Args:
      config: the model.
      merged_experts: one tensor for all experts of a layer instead of one an expert.
    """
    found = {p.name: p.shape for blocks in pieces(config, merged_experts).values() for p in blocks}
    return {name: found[name] for name in sorted(found, key=_model_order)}


def _model_order(name: str) -> tuple[int, list[tuple[int, str]]]:
    section = (
        1 if ".layers." in name else {"model.norm.weight": 2, "lm_head.weight": 3}.get(name, 0)
    )
    parts = re.split(r"(\d+)", name)
    return section, [(int(p), "") if p.isdigit() else (0, p) for p in parts]


def uses_merged_experts(names: Iterable[str]) -> bool:
    """Whether these tensor names are of the merged expert layout."""
    endings = tuple(rule.merged.split("}.")[1] for rule in TABLE if rule.merged)
    return any(name.endswith(endings) for name in names)
