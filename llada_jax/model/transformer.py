"""LLaDA2-MoE: a thin Linen module over the weights table and plain functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, no_type_check

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llada_jax.config import ModelConfig
from llada_jax.model.attention import attend, attend_cached, project_out, project_qkv
from llada_jax.model.cache import KVCache
from llada_jax.model.experts import RouterStats, mixture_of_experts
from llada_jax.model.layers import contract, gated_mlp, rms_norm
from llada_jax.model.rotary import rotary_tables
from llada_jax.model.weights import WeightSpec, weight_specs
from pallas_kernels import Implementation, WindowMask
from pallas_kernels.block_diffusion_attention import BlockDiffusionMask
from pallas_kernels.confidence_head import HeadResult, confidence_head
from pallas_kernels.quantized import Matrix, QuantizedMatrix


@no_type_check  # a pytree also holds tracers, shapes, shardings
class ModelOutput(flax.struct.PyTreeNode):
    """What a forward pass gives.

    Attributes:
      hidden: final normed hidden states; ``LLaDA2.logits`` turns them into scores.
      fresh: keys and values of the input tokens, to be written to a cache.
      layers: the residual stream after each layer, if it was asked for.
      router: load and z-loss of the expert layers; ``None`` for a dense model.
    """

    hidden: Float[Array, "B T D"]
    fresh: KVCache
    layers: Float[Array, "layers B T D"] | None = None
    router: RouterStats | None = None


class _Weights(nn.Module):
    """Declares a sub-tree of the weights table and returns it as nested dictionaries."""

    specs: Mapping[str, Any]
    initializer_range: float
    param_dtype: Any

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        for name, spec in self.specs.items():
            if isinstance(spec, WeightSpec):
                tree[name] = self._weight(name, spec)
            else:
                tree[name] = _Weights(spec, self.initializer_range, self.param_dtype, name=name)()
        return tree

    def _weight(self, name: str, spec: WeightSpec) -> Matrix:
        stored = self.get_variable("params", name)
        if not isinstance(stored, QuantizedMatrix):
            return self.param(name, spec.initialize, self.initializer_range, self.param_dtype)
        if spec.fold is None or stored.shape != spec.fold.shape(spec.shape):
            raise ValueError(
                f"{'/'.join(self.path)}/{name} is quantised as matrices of shape {stored.shape}, "
                f"which a weight of shape {spec.shape} does not fold into; quantise it with "
                "quantize_params"
            )
        return stored


class LLaDA2(nn.Module):
    """The LLaDA2-MoE language model.

    Predictions are not shifted: the logits at position ``i`` predict the token at ``i``.

    Attributes:
      config: the architecture.
      dtype: the activations' type; weights are cast to it where they are used.
      param_dtype: the type of freshly initialised weights.
      remat: what the backward pass of a layer keeps: ``"none"`` (everything: no recomputation),
        ``"dots"`` (products with weights) or ``"full"`` (only the layer's input).
      kernels: ``"pallas"`` or ``"xla"`` for attention, experts and the head when decoding, and for
        attention in training; ``None``: Pallas where the program is compiled for a TPU.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"
    kernels: Implementation | None = None

    def setup(self):
        """Declares the weights, group by group."""
        self._groups = {
            name: _Weights(spec, self.config.initializer_range, self.param_dtype, name=name)
            for name, spec in weight_specs(self.config).items()
        }

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        *,
        mask: Bool[Array, "#B T S"] | WindowMask | BlockDiffusionMask | None = None,
        cache: KVCache | None = None,
        cache_length: Int[Array, " B"] | None = None,
        context: KVCache | None = None,
        live: Bool[Array, "B T"] | None = None,
        embedding_noise: Float[Array, "B T D"] | None = None,
        return_layers: bool = False,
    ) -> ModelOutput:
        """Runs the layers over fresh tokens, after an optional cached prefix.

        Args:
          tokens: token ids in ``[0, V)``.
          positions: absolute positions; ``0 … T-1`` by default.
          mask: which tokens each fresh token sees, those of ``context`` first; all by default. A
            ``WindowMask`` with a cache; otherwise a ``BlockDiffusionMask``, or dense for toys.
          cache: keys and values of earlier tokens, seen by every fresh token. Inference only.
          cache_length: valid cache positions of each row; needed with ``cache``.
          context: keys and values of other tokens, seen as ``mask`` says. Unlike a cache it has
            a gradient: the noisy copies of a training step read the clean copy through it.
          live: tokens whose result matters (see ``mixture_of_experts``).
          embedding_noise: added to the embedded tokens.
          return_layers: also return the residual stream after each layer.

        Returns:
          Hidden states, and the fresh tokens' keys and values.

        Raises:
          ValueError: for a cache with another mask, or without ``cache_length``.
        """
        config = self.config
        window, seen = (mask, None) if isinstance(mask, WindowMask) else (None, mask)
        if cache is not None and (seen is not None or cache_length is None):
            raise ValueError(
                "with a cache the mask must be a WindowMask or None, and cache_length be given"
            )
        if cache is None and window is not None:
            seen = window.dense(tokens.shape[1])
        weights = {name: group() for name, group in self._groups.items()}
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        cos, sin = rotary_tables(positions, config, self.dtype)

        def layer(x, w, index, before, feed_forward):
            with jax.named_scope("attention"):
                normed = rms_norm(x, w["attention_norm"]["scale"], config.rms_norm_eps)
                query, key, value = project_qkv(normed, w["attention"], cos, sin, config)
                if cache is not None and cache_length is not None:
                    fresh = (query, key, value)
                    mixed = attend_cached(*fresh, cache, cache_length, index, window, self.kernels)
                elif before is not None:
                    seen_key = jnp.concatenate([before.keys, key], axis=2)
                    seen_value = jnp.concatenate([before.values, value], axis=2)
                    mixed = attend(query, seen_key, seen_value, seen, self.kernels)
                else:
                    mixed = attend(query, key, value, seen, self.kernels)
                x = x + project_out(mixed, w["attention"]["out"])
            with jax.named_scope("feed_forward"):
                normed = rms_norm(x, w["mlp_norm"]["scale"], config.rms_norm_eps)
                added, stats = feed_forward(normed, w)
                x = x + added
            return x, (key, value, x if return_layers else None, stats)

        def stack(x, group, first_layer, feed_forward):
            count = len(group["attention_norm"]["scale"])
            index = jnp.arange(count)

            before = jax.tree.map(lambda a: a[first_layer : first_layer + count], context)

            def body(x, step):
                w, i, before = step
                return layer(x, w, first_layer + i, before, lambda n, w: feed_forward(n, w, i))

            return jax.lax.scan(_checkpointed(body, self.remat), x, (group, index, before))

        x = jnp.take(weights["embed"]["embedding"], tokens, axis=0).astype(self.dtype)
        if embedding_noise is not None:
            x = x + embedding_noise.astype(self.dtype)
        outputs, router = [], None
        if config.num_dense_layers:

            def dense(normed, w, i):
                return gated_mlp(normed, w["mlp"]), None

            x, out = stack(x, weights["dense_layers"], 0, dense)
            outputs.append(out[:3])
        if config.num_moe_layers:
            group, experts = weights["moe_layers"], None
            if cache is not None:
                # Read one layer's experts where they lie: a scan would copy them all out, of
                # which a decoding step touches a part.
                experts = group["moe"]["experts"]
                group = group | {"moe": {k: v for k, v in group["moe"].items() if k != "experts"}}

            def moe(normed, w, i):
                if experts is None:
                    return mixture_of_experts(normed, w["moe"], config, live)
                moe = w["moe"] | {"experts": experts}
                return mixture_of_experts(normed, moe, config, live, i, self.kernels)

            x, (*out, router) = stack(x, group, config.num_dense_layers, moe)
            outputs.append(tuple(out))
        keys, values, layers = jax.tree.map(lambda *a: jnp.concatenate(a), *outputs)
        hidden = rms_norm(x, weights["final_norm"]["scale"], config.rms_norm_eps)
        return ModelOutput(hidden, KVCache(keys, values), layers, router)

    def head(self) -> Float[Array, "D V"] | QuantizedMatrix:
        """The matrix from hidden states to scores, as it is stored."""
        if self.config.tie_word_embeddings:
            return self._groups["embed"]()["embedding"].T
        return self._groups["lm_head"]()["kernel"]

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Scores over the vocabulary, float32; the product itself runs in ``dtype``."""
        with jax.named_scope("lm_head"):
            return contract("...d,dv->...v", hidden, self.head()).astype(jnp.float32)

    def confidence(
        self,
        hidden: Float[Array, "*batch D"],
        banned: Int[Array, "*batch"],
        penalised: Int[Array, "*batch"],
        penalty: Float[Array, "*batch"],
    ) -> HeadResult:
        """The best token of every position and what the softmax says of it, without the scores.

        Args:
          hidden: final hidden states.
          banned: a token that is impossible at this position; -1 for none.
          penalised: a token whose score is lowered by ``penalty``; -1 for none.
          penalty: by how much.
        """
        tied = self.config.tie_word_embeddings
        return confidence_head(
            hidden,
            self._groups["embed"]()["embedding"] if tied else self._groups["lm_head"]()["kernel"],
            banned=banned,
            penalised=penalised,
            penalty=penalty,
            transposed=tied,
            implementation=self.kernels,
        )

    def init_params(self, key: Array) -> dict[str, Any]:
        """Freshly initialised weights, as the nested dictionary that ``apply`` takes."""
        tokens = jnp.zeros((1, 1), jnp.int32)
        return jax.jit(lambda k: self.init(k, tokens)["params"])(key)


def _checkpointed(body, remat: str):
    if remat == "none":
        return body
    policies = {
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "full": jax.checkpoint_policies.nothing_saveable,
    }
    if remat not in policies:
        raise ValueError(f"remat {remat!r} is none of none, dots, full")
    return jax.checkpoint(body, policy=policies[remat], prevent_cse=False)
