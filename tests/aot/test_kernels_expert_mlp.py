"""The expert kernel compiles for the four generations, within VMEM (needs the extra ``aot``)."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import aot, schedule
from pallas_kernels.chips import CHIPS
from pallas_kernels.expert_mlp import tuning
from pallas_kernels.expert_mlp.kernel import expert_mlp_pallas
from pallas_kernels.expert_mlp.routing import sort_pairs
from pallas_kernels.quantized import quantize

pytestmark = pytest.mark.aot

SHAPES = {  # layers, E, D, F, k
    "mini": (1, 256, 2048, 512, 8),
    "flash": (1, 64, 4096, 1024, 8),  # fewer experts: 16 GB hold no more
    "nano": (3, 8, 192, 64, 2),
}


def build(chip, shape, tokens, scheme, dtype="bfloat16"):
    """The kernel as the model calls it: ``(function, shapes)``."""
    layers, experts, dim, ffn, k = SHAPES[shape]
    cores = CHIPS[chip].cores
    dtype = jnp.dtype(dtype)

    def stack(*matrix):
        weight = jax.ShapeDtypeStruct((layers, experts, *matrix), dtype)
        return jax.eval_shape(lambda w: quantize(w, scheme), weight) if scheme else weight

    gate, down = stack(dim, ffn), stack(ffn, dim)
    tiles = tuning.choose(tokens, dim, k, gate, dtype, cores)
    assert tiles is not None

    def run(x, gate, up, down, ids, gates, layer):
        touched = sort_pairs(ids, gates, experts, tiles.rows)
        return expert_mlp_pallas(x, gate, up, down, touched, layer, tiles, dtype, cores)

    shapes = (
        jax.ShapeDtypeStruct((tokens, dim), dtype),
        gate,
        gate,
        down,
        jax.ShapeDtypeStruct((tokens, k), jnp.int32),
        jax.ShapeDtypeStruct((tokens, k), jnp.float32),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    return run, shapes


def compile_kernel(chip, *arguments):
    run, shapes = build(chip, *arguments)
    return aot.compile_for(chip, run, *shapes)


SCHEMES = [None, "int8", "fp8", "int4"]
ALL = [("mini", 32, chip, scheme) for chip in CHIPS for scheme in SCHEMES]
# Every shape on every chip, every scheme with every shape, every scheme on every chip.
SOME = [
    (*shape, chip, SCHEMES[(i + j) % 4])
    for i, shape in enumerate(
        [("mini", 256), ("mini", 1024), ("flash", 32), ("flash", 1024), ("nano", 32)]
    )
    for j, chip in enumerate(CHIPS)
]


@pytest.mark.parametrize(("shape", "tokens", "chip", "scheme"), ALL + SOME)
def test_compiles(shape, tokens, chip, scheme):
    compiled = compile_kernel(chip, shape, tokens, scheme)
    # No copy of the weights: they are read where they lie.
    assert compiled.memory_analysis().temp_size_in_bytes < 80 * 2**20


@pytest.mark.parametrize("chip", CHIPS)
def test_float32_compiles(chip):
    compile_kernel(chip, "nano", 32, None, "float32")


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("scheme", [None, "int4"])
def test_the_inner_loop_spills_no_registers(chip, scheme):
    (kernel,) = (
        s
        for s in schedule.measure(chip, build, chip, "mini", 32, scheme)
        if s.name.startswith("expert_mlp")
    )
    print(schedule.describe(kernel))
    assert kernel.inner.spill_slots == 0
