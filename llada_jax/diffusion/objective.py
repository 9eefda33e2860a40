"""The training objective: M2T, T2T and keep, over the rounds of a multi-turn forward, and CAP.

A batch goes through the model as one clean copy and, for each round, N noisy ones:

    x_0 ── clean pass ──► keys, values ───────────┬─────────────────────┐
    x_t ── round 0: masks M, random edits E ──► noisy pass ─ loss ─ predictions
                                                                        │ Γ, Δ with drawn thresholds
                         x_t' ── round 1: the model's own draft ──► noisy pass ─ loss ─ …

Every position that may be masked is supervised in every round; what it counts depends on what
stands there: the mask (M2T), a wrong token (T2T), or the right one (keep).

Losses are kept as sums with their weights' sums, to be divided once, after adding up
micro-batches, devices and processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, no_type_check

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llada_jax.diffusion.config import DiffusionConfig
from llada_jax.diffusion.head import HeadStats, head_stats
from llada_jax.diffusion.layout import Rows, clean_context, joint_pass, noisy_pass
from llada_jax.diffusion.noise import Noise, write_draft
from llada_jax.model.experts import RouterStats

_SMALLEST_T = 1e-3  # 1/t is cut here


@no_type_check  # a pytree also holds tracers and shapes
class Mean(flax.struct.PyTreeNode):
    """A mean that is not divided yet; ``+`` joins two."""

    total: Float[Array, ""]
    weight: Float[Array, ""]

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.weight + other.weight)

    def value(self) -> Float[Array, ""]:
        """The mean; 0 if nothing was weighed."""
        return jnp.where(self.weight > 0, self.total / jnp.maximum(self.weight, 1e-20), 0.0)


@no_type_check
class Losses(flax.struct.PyTreeNode):
    """What one batch gives.

    Attributes:
      terms: the parts of the loss by name, coefficients included: ``diffusion``, and where they
        are on ``confidence`` (CAP) and ``z``. The loss is the sum of their means.
      metrics: means to report; constants for the gradient.
      load: tokens that each expert got, ``[expert layers, E]``; ``None`` for a dense model.
    """

    terms: dict[str, Mean]
    metrics: dict[str, Mean]
    load: Float[Array, "layers E"] | None

    def __add__(self, other: Losses) -> Losses:
        def add(a: dict[str, Mean], b: dict[str, Mean]) -> dict[str, Mean]:
            return {name: a[name] + b[name] for name in a}

        load = None if self.load is None or other.load is None else self.load + other.load
        return Losses(add(self.terms, other.terms), add(self.metrics, other.metrics), load)


def objective(
    model: nn.Module,
    config: DiffusionConfig,
    params: Any,
    batch: Mapping[str, Array],
    noise: Noise,
    step: Int[Array, ""] | int = 0,
) -> Losses:
    """Losses of one batch.

    Args:
      model: ``LLaDA2``.
      config: the objective of this phase.
      params: the model's weights.
      batch: ``tokens``, ``positions``, ``document`` (0 is padding) and ``supervised``, each
        ``[B, L]``.
      noise: ``draw_noise`` of this batch.
      step: the training step, for what fades with time.

    Returns:
      Sums and weights; a batch with nothing supervised gives finite zeros.

    Source: 2.0 report, equations 1 and 2 (weight 1/t; as printed they lack a sign), CAP; 2.1 report
    (M2T + T2T, multi-turn forward).
    """
    c: Any = model.config  # type: ignore[attr-defined]
    tokens, document = batch["tokens"], batch["document"]
    supervised = (batch["supervised"] & (document > 0))[:, None]
    target = tokens[:, None]
    block_size = None if config.mdlm else config.block_size
    rows = Rows.of(batch["positions"], document, block_size, config.aligned)
    noisy = noise.noisy
    head = model.apply({"params": params}, method="head")
    context, routers = None, []
    if config.layout == "split" and not config.mdlm:
        with jax.named_scope("clean_copy"):
            context, router = clean_context(model, params, tokens, rows)
            routers.append(router)

    terms = {"diffusion": _zero(), "confidence": _zero()}
    metrics = {name: _zero() for name in _METRICS}
    for turn in range(config.rounds):
        masked = noisy == c.mask_token_id
        added = _embedding_noise(config, params, masked, noise.row_keys, turn, step)
        with jax.named_scope(f"round_{turn}"):
            if config.layout == "joint" and not config.mdlm:
                out = joint_pass(model, params, noisy, tokens, rows, added)
            else:
                out = noisy_pass(model, params, noisy, rows, context, added)
        routers.append(out.router)
        with jax.named_scope("loss"):
            stats: HeadStats = head_stats(
                _flat(out.hidden),
                head,
                _flat(jnp.broadcast_to(target, noisy.shape)),
                _flat(jnp.broadcast_to(supervised, noisy.shape)),
                c.mask_token_id,
                config.confidence_temperature,
                config.loss_chunk,
                config.confidence_beta > 0,
            )
            log_prob, entropy, best, draft, confidence = (a.reshape(noisy.shape) for a in stats)
            kinds = {
                "m2t": supervised & masked,
                "t2t": supervised & ~masked & (noisy != target),
                "keep": supervised & ~masked & (noisy == target),
            }
            weights = {
                "m2t": config.mask_loss * _mask_weights(config, turn, noise.rates, rows, masked),
                "t2t": config.edit_loss,
                "keep": config.keep_loss,
            }
            weight = jnp.zeros(noisy.shape)
            for name, kind in kinds.items():
                weight += jnp.where(kind, weights[name], 0.0)
            if config.loss_weight == "inverse_t" and turn == 0:
                total_weight = jnp.float32(config.copies) * supervised.sum()
            else:
                total_weight = weight.sum()
            terms["diffusion"] += Mean(-(weight * log_prob).sum(), total_weight)
            right = kinds["m2t"] & (best == target)
            sure = Mean(jnp.where(right, entropy, 0.0).sum(), right.sum().astype(jnp.float32))
            terms["confidence"] += sure
            for name, kind in kinds.items():
                metrics[f"{name}_loss"] += _mean(-log_prob, kind)
                metrics[f"{name}_accuracy"] += _mean(best == target, kind)
            metrics["entropy"] += _mean(entropy, right)
        if turn + 1 < config.rounds:
            with jax.named_scope("write_draft"):
                noisy = write_draft(
                    noisy,
                    draft,
                    confidence,
                    noise.fill_above[:, turn],
                    noise.edit_above[:, turn],
                    c.mask_token_id,
                )

    terms["confidence"] = _scaled(terms["confidence"], config.confidence_beta)
    routed = [router for router in routers if router is not None]
    if routed:
        router: Any = jax.tree.map(lambda *leaves: sum(leaves), *routed)
        terms["z"] = _scaled(_router_z(router, c.num_experts_per_tok), config.z_loss)
    coefficients = {"diffusion": 1.0, "confidence": config.confidence_beta, "z": config.z_loss}
    return Losses(
        {name: term for name, term in terms.items() if coefficients[name]},
        jax.lax.stop_gradient(metrics),
        router.load.astype(jnp.float32) if routed else None,
    )


_METRICS = (
    *(f"{kind}_{what}" for kind in ("m2t", "t2t", "keep") for what in ("loss", "accuracy")),
    "entropy",
)


def cart_weights(
    masked: Bool[Array, "B N L"], rows: Rows, p: float, *, with_context: bool = True
) -> Float[Array, "B N L"]:
    """CART: a masked token counts half the geometric weights of the visible tokens it can see.

    ``w_i = 1/2 sum_j p (1 - p)^(|i - j| - 1)`` over visible j (Dream); with visible tokens on both
    sides everywhere it is 1.
    """
    same = (rows.block[:, 1:] == rows.block[:, :-1]) & (
        rows.document[:, 1:] == rows.document[:, :-1]
    )
    same = same[:, None].astype(jnp.float32)  # of neighbours i and i + 1
    visible = (~masked).astype(jnp.float32)

    def before(visible: Array, same: Array) -> Array:
        """``sum_j p (1-p)^(i-j-1)`` over visible j < i of i's block: a linear recurrence."""
        pad = ((0, 0), (0, 0), (1, 0))
        decay = jnp.broadcast_to(jnp.pad((1.0 - p) * same, pad), visible.shape)
        added = jnp.pad(p * same * visible[..., :-1], pad)

        def chain(first, second):
            return first[0] * second[0], second[0] * first[1] + second[1]

        return jax.lax.associative_scan(chain, (decay, added), axis=-1)[1]

    own = before(visible, same) + before(visible[..., ::-1], same[..., ::-1])[..., ::-1]
    clean = jnp.zeros(())
    if with_context and rows.block_size is not None:
        behind = rows.block * rows.block_size  # clean tokens in the document's earlier blocks
        inside = rows.positions - behind
        clean = (1.0 - p) ** inside * (1.0 - (1.0 - p) ** behind)
        clean = jnp.where(rows.document > 0, clean, 0.0)[:, None]
    return 0.5 * (own + clean)


def _mask_weights(config: DiffusionConfig, turn: int, rates: Array, rows: Rows, masked: Array):
    """1/t belongs to the masks that t drew: those of round 0."""
    weight = jnp.ones(masked.shape, jnp.float32)
    if config.loss_weight == "inverse_t" and turn == 0:
        weight = weight / jnp.maximum(rates, _SMALLEST_T)
    if config.cart_p:
        weight = weight * cart_weights(masked, rows, config.cart_p, with_context=not config.mdlm)
    return weight


def _embedding_noise(
    config: DiffusionConfig, params, masked: Array, row_keys: Array, turn: int, step
):
    if not config.mask_noise_steps:
        return None
    table = jax.lax.stop_gradient(params["embed"]["embedding"]).astype(jnp.float32)
    size = jnp.sqrt((table**2).sum(-1)).mean() / jnp.sqrt(table.shape[1])
    fade = jnp.maximum(1.0 - step / config.mask_noise_steps, 0.0)
    shape = (*masked.shape[1:], table.shape[1])
    drawn = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, turn), shape))(row_keys)
    return jnp.where(masked[..., None], fade * size * drawn, 0.0)


def _router_z(router: RouterStats, experts_per_token: int) -> Mean:
    """Mean over tokens and layers; the load counts each token once for each of its experts."""
    tokens = router.load.sum().astype(jnp.float32) / experts_per_token
    return Mean(router.z.sum(), tokens)


def _scaled(mean: Mean, factor: float) -> Mean:
    return Mean(factor * mean.total, mean.weight)


def _mean(values: Array, where: Array) -> Mean:
    total = jnp.where(where, values.astype(jnp.float32), 0.0).sum()
    return Mean(total, where.sum().astype(jnp.float32))


def _zero() -> Mean:
    return Mean(jnp.float32(0), jnp.float32(0))


def _flat(x: Array) -> Array:  # [B, N, ...] -> [B N, ...]
    return x.reshape(-1, *x.shape[2:])
