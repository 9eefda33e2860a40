"""Training attention compiles for TPUs, forward and backward (needs the extra ``aot``)."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import aot
from pallas_kernels.block_diffusion_attention import BlockDiffusionMask, block_diffusion_attention
from pallas_kernels.block_diffusion_attention.tuning import tiles_for
from pallas_kernels.chips import CHIPS

pytestmark = pytest.mark.aot


def compile_attention(chip, layout, length, *, heads=16, rows=1, copies=1, block=32):
    place = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    mask = BlockDiffusionMask(place, place, layout, block, copies, aligned=True)
    queries, keys = (length * len(x) for x in (mask.geometry.queries, mask.geometry.keys))
    query = jax.ShapeDtypeStruct((rows, queries, heads, 128), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((rows, 4, keys, 128), jnp.bfloat16)
    tiles = tiles_for(mask.geometry, chip)

    def gradients(q, k, v, mask):
        def loss(q, k, v):
            mixed = block_diffusion_attention(q, k, v, mask, implementation="pallas", tiles=tiles)
            return (mixed.astype(jnp.float32) ** 2).sum()

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    return aot.compile_for(chip, gradients, query, key, key, mask)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    ("layout", "heads", "rows", "copies", "block"),
    [
        ("clean", 16, 2, 1, 32),
        ("noisy", 16, 2, 1, 32),
        ("noisy", 32, 1, 1, 32),
        ("alone", 16, 1, 1, None),
        ("joint", 16, 1, 2, 32),
    ],
)
def test_compiles(chip, layout, heads, rows, copies, block):
    """At 4096 tokens: mini's 16 heads, flash's 32."""
    compiled = compile_attention(
        chip, layout, 4096, heads=heads, rows=rows, copies=copies, block=block
    )
    assert "splash_mha_dkv" in compiled.as_text()


@pytest.mark.parametrize(("chip", "length"), [("v5p", 32768), ("v5e", 131072)])
def test_long_rows_compile(chip, length):
    """Temporary memory is a few copies of the operands: linear in the length."""
    compiled = compile_attention(chip, "noisy", length)
    temporary = compiled.memory_analysis().temp_size_in_bytes
    operands = (length * 16 + 2 * 2 * length * 4) * 128 * 2
    assert temporary < 12 * operands
