"""One training step as one compiled program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from llada_jax.diffusion import DiffusionConfig, Losses, draw_noise, objective
from llada_jax.parallel import in_mesh
from llada_jax.training.config import TrainSection
from llada_jax.training.optimizer import balance_experts, global_norm, without_padding_gradient
from llada_jax.training.state import BATCH_AXES, TrainState

Batch = Mapping[str, Array]  # [A, B, L]: A micro-batches of B rows
StepFunction = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Micro-batches follow each other; their rows are spread over the devices."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))


def make_step(
    model: nn.Module,
    diffusion: DiffusionConfig,
    train: TrainSection,
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
    mesh: Mesh,
) -> StepFunction:
    """Compiles (at the first call) noise, forward, backward, update and load balancing.

    Gradients are those of the loss over all micro-batches and processes: sums are divided by the
    sums of their weights once, at the end.

    Returns:
      ``(state, batch) -> (state, metrics)``; the state given is consumed. Metrics are float32
      scalars: ``loss`` and its terms, M2T, T2T and keep apart, ``grad_norm``, ``expert_imbalance``
      (largest load over mean load, worst layer).
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        with in_mesh(mesh):
            gradients, losses = loss_gradients(
                model, diffusion, state.params, batch, key, state.step
            )
        if not train.train_pad_embedding and "lm_head" in gradients:  # a tied row is the head's too
            pad: int = model.config.pad_token_id  # type: ignore[attr-defined]
            gradients = without_padding_gradient(gradients, pad)
        with jax.named_scope("update"):
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            params: Any = optax.apply_updates(state.params, updates)
            if losses.load is not None and train.expert_bias_update_rate:
                router = params["moe_layers"]["moe"]["router"]
                router["expert_bias"] = balance_experts(
                    router["expert_bias"], losses.load, train.expert_bias_update_rate
                )
        metrics = summary(losses) | {"grad_norm": global_norm(gradients)}
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    rows = batch_sharding(mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        step,
        in_shardings=(shardings, rows),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
    )


def make_evaluation(
    model: nn.Module, diffusion: DiffusionConfig, shardings: TrainState, mesh: Mesh
) -> Callable[[Any, Batch, Array], Losses]:
    """``(params, batch, key) -> losses`` without a gradient, one micro-batch at a time.

    What fades with time (the noise on mask embeddings) is off.
    """
    diffusion = dataclasses.replace(diffusion, mask_noise_steps=0)

    def evaluate(params: Any, batch: Batch, key: Array) -> Losses:
        rows = jax.tree.map(lambda x: x[0], dict(batch))
        noise = draw_noise(key, rows, model.config, diffusion)  # type: ignore[attr-defined]
        with in_mesh(mesh):
            return objective(model, diffusion, params, rows, noise)

    return jax.jit(evaluate, in_shardings=(shardings.params, batch_sharding(mesh), None))


def loss_gradients(
    model: nn.Module,
    diffusion: DiffusionConfig,
    params: Any,
    batch: Batch,
    key: Array,
    step: Array | int,
) -> tuple[Any, Losses]:
    """Gradients of the loss over all micro-batches, and the joined losses.

    The noise is drawn for all micro-batches together, so cutting a batch into more of them changes
    nothing. With several, each term of the loss has a backward pass of its own: how much it weighs
    is known only when all have been seen.
    """
    count, rows = batch["tokens"].shape[:2]
    whole = {name: x.reshape(count * rows, *x.shape[2:]) for name, x in batch.items()}
    noise = draw_noise(key, whole, model.config, diffusion)  # type: ignore[attr-defined]

    def losses_of(params: Any, piece: tuple[Any, Any]) -> Losses:
        return objective(model, diffusion, params, piece[0], piece[1], step)

    if count == 1:

        def total(params: Any) -> tuple[Array, Losses]:
            losses = losses_of(params, (whole, noise))
            return loss_value(losses), losses

        return jax.grad(total, has_aux=True)(params)

    def cut(x: Array) -> Array:
        return x.reshape(count, rows, *x.shape[1:])

    pieces = jax.tree.map(cut, (whole, noise))

    def totals(params: Any, piece: Any) -> tuple[dict[str, Array], Losses]:
        losses = losses_of(params, piece)
        return {name: term.total for name, term in losses.terms.items()}, losses

    def add_piece(carry: tuple[dict[str, Any], Losses], piece: Any):
        gradients, joined = carry
        values, pull_back, losses = jax.vjp(lambda p: totals(p, piece), params, has_aux=True)
        for name in gradients:
            chosen = {n: jnp.float32(n == name) for n in values}
            (of_term,) = pull_back(chosen)
            gradients[name] = jax.tree.map(jnp.add, gradients[name], of_term)
        return (gradients, joined + losses), None

    first = jax.eval_shape(losses_of, params, jax.tree.map(lambda x: x[0], pieces))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), first)
    start = {name: jax.tree.map(jnp.zeros_like, params) for name in zeros.terms}
    (by_term, losses), _ = jax.lax.scan(add_piece, (start, zeros), pieces)
    scaled = [
        jax.tree.map(lambda g, w=losses.terms[name].weight: _divide(g, w), by_term[name])
        for name in by_term
    ]
    return jax.tree.map(lambda *g: sum(g), *scaled), losses


def loss_value(losses: Losses) -> Array:
    """The loss: each term's mean, added up; 0 for a batch with nothing to learn."""
    return sum((term.value() for term in losses.terms.values()), jnp.float32(0))


def summary(losses: Losses) -> dict[str, Array]:
    """Scalars to report. A kind of token that did not occur has no entry's value: NaN."""
    result = {"loss": loss_value(losses)}
    result |= {f"{name}_term": term.value() for name, term in losses.terms.items()}
    for name, mean in losses.metrics.items():
        result[name] = jnp.where(mean.weight > 0, mean.value(), jnp.nan)
    result["m2t_tokens"] = losses.metrics["m2t_loss"].weight
    if losses.load is not None:
        result["expert_imbalance"] = (losses.load.max(-1) / losses.load.mean(-1)).max()
    return result


def _divide(gradient: Array, weight: Array) -> Array:
    return jnp.where(weight > 0, gradient / jnp.maximum(weight, 1e-20), 0)
