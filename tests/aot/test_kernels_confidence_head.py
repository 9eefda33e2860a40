"""The confidence head compiles for TPUs and never holds the logits."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import ShapeDtypeStruct as Shape
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels import aot, schedule
from pallas_kernels.chips import CHIPS
from pallas_kernels.confidence_head import confidence_head
from pallas_kernels.quantized import QuantizedMatrix

pytestmark = pytest.mark.aot

VOCABULARY = 157184
MIB = 1 << 20


def propose(hidden, head, banned, penalised, penalty, transposed=False):
    return confidence_head(
        hidden,
        head,
        banned=banned,
        penalised=penalised,
        penalty=penalty,
        transposed=transposed,
        # The default asks for the platform; here it is a TPU in any case.
        implementation="pallas",
    )


def positions(b):
    integers = Shape((b, 32), jnp.int32)
    return integers, integers, Shape((b, 32), jnp.float32)


def int8_head(d):
    values, scales = Shape((d, VOCABULARY), jnp.int8), Shape((1, VOCABULARY), jnp.float32)
    return QuantizedMatrix(values, scales, "int8", d)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    ("d", "b", "head"),
    [
        (2048, 1, "bfloat16"),
        (2048, 8, "int8"),
        (2048, 32, "bfloat16"),
        (4096, 1, "int8"),
        (4096, 8, "bfloat16"),
        (4096, 32, "int8"),
    ],
)
def test_compiles(chip, d, b, head):
    run, shapes = build(d, b, head)
    compiled = aot.compile_for(chip, run, *shapes)
    assert compiled.as_text().count("tpu_custom_call") == 1
    assert compiled.memory_analysis().temp_size_in_bytes < 16 * MIB


@pytest.mark.parametrize("chip", CHIPS)
def test_float32_and_a_tied_head(chip):
    """float32 at flash's width is what needs the most VMEM; [V, D] is not transposed in HBM."""
    hidden = Shape((32, 32, 4096), jnp.float32)
    head = Shape((VOCABULARY, 4096), jnp.float32)
    tied = functools.partial(propose, transposed=True)
    compiled = aot.compile_for(chip, tied, hidden, head, *positions(32))
    assert compiled.memory_analysis().temp_size_in_bytes < 32 * MIB


@pytest.mark.parametrize("chip", CHIPS)
def test_the_default_is_the_kernel_over_the_mesh(chip):
    mesh = aot.mesh(chip, data=2, tensor=2)

    def shape(like, *spec):
        return Shape(like.shape, like.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    arguments = (
        shape(Shape((8, 32, 2048), jnp.bfloat16), "data"),
        jax.tree.map(lambda x: shape(x, None, "tensor"), int8_head(2048)),
        *(shape(x, "data") for x in positions(8)),
    )

    def propose(hidden, head, banned, penalised, penalty):
        options = {"banned": banned, "penalised": penalised, "penalty": penalty}
        return confidence_head(hidden, head, **options)

    with jax.set_mesh(mesh):
        text = jax.jit(propose).lower(*arguments).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 1
    assert f"s8[2048,{VOCABULARY}]" not in text  # the head stays where it is


def build(d, b, head):
    """``(function, shapes)``."""
    matrix = int8_head(d) if head == "int8" else Shape((d, VOCABULARY), jnp.bfloat16)
    return propose, (Shape((b, 32, d), jnp.bfloat16), matrix, *positions(b))


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("b", [1, 8])
def test_the_inner_loop_spills_no_registers(chip, b):
    schedules = schedule.measure(chip, build, 2048, b, "bfloat16")
    (kernel,) = (s for s in schedules if s.name.startswith("confidence_head"))
    print(schedule.describe(kernel))
    assert kernel.inner.spill_slots == 0
