"""The decode attention kernel compiles for the four generations (needs the extra ``aot``)."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import aot, schedule
from pallas_kernels.block_decode_attention.call import decode_attention
from pallas_kernels.chips import CHIPS

pytestmark = pytest.mark.aot

SHAPES = {"mini": (16, 4, 128), "flash": (32, 4, 128), "nano": (4, 2, 32)}  # N, K, H


def build(chip, shape, batch, length, capacity, dtype="bfloat16", int8=False, causal=False):
    """The function and its shapes for ``aot.compile_for``."""
    heads, kv_heads, head_dim = SHAPES[shape]
    struct, dtype = jax.ShapeDtypeStruct, jnp.dtype(dtype)
    fresh = struct((batch, kv_heads, length, head_dim), dtype)
    cache = struct((2, batch, kv_heads, capacity, head_dim), jnp.int8 if int8 else dtype)
    lengths = struct((batch,), jnp.int32)
    scale = struct(cache.shape[:-1], jnp.float32)

    def run(*operands):
        block_length = 32 if causal else None
        return decode_attention(*operands, block_length=block_length, cores=CHIPS[chip].cores)

    return run, (
        struct((batch, length, heads, head_dim), dtype),
        fresh,
        fresh,
        cache,
        cache,
        lengths,
        struct((), jnp.int32),
        lengths,
        struct((batch,), jnp.bool_) if causal else None,
        (scale, scale) if int8 else None,
    )


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("shape", ["mini", "flash"])
def test_bfloat16_spills_no_registers(chip, shape):
    schedules = schedule.measure(chip, build, chip, shape, 8, 32, 4096)
    (kernel,) = (s for s in schedules if s.name.startswith("block_decode_attention"))
    print(schedule.describe(kernel))
    assert kernel.inner.spill_slots == 0


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("shape", ["mini", "flash"])
def test_int8_compiles(chip, shape):
    run, shapes = build(chip, shape, 8, 32, 4096, int8=True)
    compiled = aot.compile_for(chip, run, *shapes)
    # The cache is read where it lies: nothing of its size is copied.
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * 2**20


@pytest.mark.parametrize("chip", ["v5p", "tpu7x"])
def test_prefill_compiles(chip):
    run, shapes = build(chip, "flash", 8, 256, 4096, causal=True)
    compiled = aot.compile_for(chip, run, *shapes)
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * 2**20


@pytest.mark.parametrize(("chip", "dtype"), [("v5e", "float32"), ("v6e", "bfloat16")])
def test_small_heads_compile(chip, dtype):
    run, shapes = build(chip, "nano", 2, 32, 96, dtype)
    aot.compile_for(chip, run, *shapes)
