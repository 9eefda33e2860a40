"""The training state, and where each part of it lies on the mesh."""

from __future__ import annotations

from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from llada_jax.config import ModelConfig
from llada_jax.model.weights import flatten_specs, weight_specs
from llada_jax.parallel import named_sharding

BATCH_AXES = ("data", "fsdp")  # rows of a batch are spread over both


@no_type_check  # a pytree also holds shapes and shardings
class TrainState(flax.struct.PyTreeNode):
    """Everything that a step changes; with the data's position it is the whole of a run.

    Attributes:
      step: optimizer steps done.
      params: float32 weights.
      opt_state: of optax.
      key: the run's randomness; a step's is ``fold_in(key, step)``.
    """

    step: Int[Array, ""]
    params: dict[str, Any]
    opt_state: Any
    key: Array


def param_shardings(config: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """The weights table's shardings, as a nested dictionary."""
    flat = {
        path: named_sharding(spec.axes, spec.shape, mesh)
        for path, spec in flatten_specs(weight_specs(config)).items()
    }
    return traverse_util.unflatten_dict(flat, sep="/")


def state_shardings(
    config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Where each part of the state lies: moments where their weights are, the rest everywhere."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    params = param_shardings(config, mesh)
    shapes = traverse_util.unflatten_dict(
        {
            path: jax.ShapeDtypeStruct(spec.shape, jnp.float32)
            for path, spec in flatten_specs(weight_specs(config)).items()
        },
        sep="/",
    )
    opt_state = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, shapes),
        params,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(everywhere, params, opt_state, everywhere)  # type: ignore[arg-type]


def new_state(
    params: Any, optimizer: optax.GradientTransformation, seed: int, shardings: TrainState
) -> TrainState:
    """The state before the first step.

    Args:
      params: weights in any floating type; float32 copies are made.
      optimizer: of the run.
      seed: of the run.
      shardings: ``state_shardings``.
    """

    def make(params: Any) -> TrainState:
        master = jax.tree.map(lambda w: jnp.array(w, jnp.float32), params)
        key = jax.random.key_data(jax.random.key(seed))
        return TrainState(jnp.int32(0), master, optimizer.init(master), key)

    return jax.jit(make, out_shardings=shardings)(params)
