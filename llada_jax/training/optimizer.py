"""AdamW, its schedules, and what is kept from it: norms and biases do not decay."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jaxtyping import Array, Float

from llada_jax.training.config import TrainSection


def learning_rate(train: TrainSection, total_steps: int) -> optax.Schedule:
    """Warm-up from 0, then cosine, WSD or constant.

    Args:
      train: names and values.
      total_steps: of the whole run.

    Returns:
      A function from the step to the rate.
    """
    warmup = round(train.lr_warmup_ratio * total_steps)
    rest = max(total_steps - warmup, 1)
    if train.lr_decay_style == "cosine":
        after = optax.cosine_decay_schedule(train.lr, rest, alpha=train.lr_min / train.lr)
    elif train.lr_decay_style == "wsd":
        decay = min(max(round(train.lr_decay_ratio * total_steps), 1), rest)
        after = optax.linear_schedule(train.lr, train.lr_min, decay, rest - decay)
    else:
        after = optax.constant_schedule(train.lr)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, train.lr, warmup), after], [warmup])


def decays(params: Any) -> Any:
    """For each weight, whether weight decay applies: to matrices, not to norms and biases."""
    flat = traverse_util.flatten_dict(params, sep="/")
    kept = ("/scale", "/bias", "/expert_bias")
    return traverse_util.unflatten_dict({path: not path.endswith(kept) for path in flat}, sep="/")


def make_optimizer(train: TrainSection, total_steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW.

    The router's ``expert_bias`` has no gradient and does not decay, so AdamW leaves it alone;
    ``balance_experts`` moves it.
    """
    adamw = optax.adamw(
        learning_rate(train, total_steps),
        b1=train.beta1,
        b2=train.beta2,
        eps=train.eps,
        weight_decay=train.weight_decay,
        mask=decays,
    )
    if not train.max_grad_norm:
        return adamw
    return optax.chain(optax.clip_by_global_norm(train.max_grad_norm), adamw)


def balance_experts(
    bias: Float[Array, "layers E"], load: Float[Array, "layers E"], rate: float
) -> Float[Array, "layers E"]:
    """Load balancing without an auxiliary loss: experts below the mean load become more likely.

    The zero-mean variant of the Ling-2.0 recipe: ``b += rate * (sign(mean(load) - load) -
    mean(sign))``. Not a gradient; float32.

    Args:
      bias: ``expert_bias`` of the expert layers.
      load: tokens that each expert got in this step, all micro-batches and processes together.
      rate: 1e-3 in Ling's recipe.
    """
    sign = jnp.sign(load.mean(-1, keepdims=True) - load)
    return bias + rate * (sign - sign.mean(-1, keepdims=True))


def without_padding_gradient(gradients: Any, pad_token_id: int) -> Any:
    """Gradients in which the padding token's embedding has none (PyTorch's ``padding_idx``)."""
    table = gradients["embed"]["embedding"]
    return gradients | {"embed": {"embedding": table.at[pad_token_id].set(0)}}


def global_norm(tree: Any) -> Float[Array, ""]:
    """The norm of all gradients together, float32."""
    return optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), tree))
