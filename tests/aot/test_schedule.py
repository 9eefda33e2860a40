"""The schedule of stock splash attention is read as ``spec/tpu_aot.md`` recorded it."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from pallas_kernels import schedule

pytestmark = pytest.mark.aot

YARDSTICK = {"v5e": (675, 145), "v5p": (817, 144), "v6e": (625, 53), "tpu7x": (429, 48)}


def stock_splash():
    mask = masks.MultiHeadMask([masks.CausalMask((1024, 1024))] * 16)
    sizes = splash.BlockSizes(block_q=128, block_kv=128, block_kv_compute=128)
    kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    heads = jax.ShapeDtypeStruct((16, 1024, 128), jnp.bfloat16)
    return kernel, (heads, heads, heads)


@pytest.mark.parametrize("chip", YARDSTICK)
def test_stock_splash(chip):
    schedules = schedule.measure(chip, stock_splash)
    (kernel,) = (s for s in schedules if s.name.startswith("splash_mha_fwd"))
    assert (kernel.usage.bundles, kernel.usage.used["MXU"]) == YARDSTICK[chip]
    assert kernel.usage.spill_slots == 0
    assert len(kernel.loops) == 1
    assert kernel.inner.used["MXU"] == kernel.usage.used["MXU"]
