"""The decoding program compiles for TPUs: real compiler, no chip (needs the extra ``aot``)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llada_jax import ModelConfig, SamplingParams
from llada_jax.decoding import Decoder, ModelDenoiser, RowSettings
from llada_jax.model import LLaDA2, flatten_specs, weight_specs
from llada_jax.model.quantization import quantized_shape, quantized_shardings, weight_scheme
from llada_jax.parallel import MESH_AXES, named_sharding
from pallas_kernels import aot
from pallas_kernels.chips import CHIPS

aot.prepare()

pytestmark = pytest.mark.aot

HBM_GIB = {chip.topology: chip.hbm_gib for chip in CHIPS.values()}  # a jax device


def mesh_of(topology: str, **sizes: int) -> Mesh:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    chosen = np.array(devices[: int(np.prod(shape))]).reshape(shape)
    return Mesh(chosen, MESH_AXES, axis_types=(AxisType.Auto,) * 4)


def abstract_params(config, dtype, mesh, quantization=None):
    """Shapes, types and places of a model's weights."""
    params = {}
    for path, spec in flatten_specs(weight_specs(config)).items():
        node = params
        *parents, name = path.split("/")
        for parent in parents:
            node = node.setdefault(parent, {})
        place = named_sharding(spec.axes, spec.shape, mesh)
        scheme = weight_scheme(path, spec, quantization)
        if scheme is None:
            kept = jnp.float32 if spec.keep_dtype else dtype
            node[name] = jax.ShapeDtypeStruct(spec.shape, kept, sharding=place)
        else:
            node[name] = jax.tree.map(
                lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where),
                quantized_shape(spec, scheme),
                quantized_shardings(spec, scheme, place),
            )
    return params


def compile_decode(
    config,
    dtype,
    mesh,
    *,
    batch,
    canvas,
    max_window=1,
    prefill_chunk=256,
    quantization=None,
    cache_dtype=None,
):
    """Compiles ``Decoder.decode`` from shapes alone."""
    decoder = Decoder(
        ModelDenoiser(LLaDA2(config, dtype=dtype), mesh, cache_dtype),
        max_window=max_window,
        prefill_chunk=prefill_chunk,
    )
    params = abstract_params(config, dtype, mesh, quantization)
    everywhere = NamedSharding(mesh, PartitionSpec())
    settings = RowSettings.from_params([SamplingParams()] * batch, [0], [0] * batch)
    arguments = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere),
        (
            np.zeros((batch, canvas), np.int32),
            np.zeros(batch, np.int32),
            np.zeros(batch, np.int32),
            settings,
        ),
    )
    return Decoder.decode.lower(decoder, params, *arguments).compile()


def check_kernels(text: str) -> None:
    for name in ("block_decode_attention", "confidence_head", "expert_mlp"):
        assert f"{name}." in text, f"{name} is not in the program"


def bytes_on_a_chip(compiled) -> int:
    memory = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


@pytest.mark.parametrize("topology", HBM_GIB)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_counting_compiles(topology, dtype):
    config = ModelConfig.from_name("counting")
    window = 2 if dtype == jnp.float32 else 1
    compiled = compile_decode(
        config, dtype, mesh_of(topology), batch=2, canvas=256, max_window=window
    )
    assert bytes_on_a_chip(compiled) < 2**30
    text = compiled.as_text()
    assert "outfeed" not in text  # no host round trip inside
    assert "send(" not in text
    check_kernels(text)


@pytest.mark.parametrize("topology", HBM_GIB)
def test_mini_compiles_sharded(topology):
    """LLaDA2.1-mini in bfloat16, experts and heads over four devices, within their memory."""
    compiled = compile_decode(
        ModelConfig.from_name("mini"),
        jnp.bfloat16,
        mesh_of(topology, expert=2, tensor=2),
        batch=1,
        canvas=1024,
    )
    gib = bytes_on_a_chip(compiled) / 2**30
    print(f"{topology}: {gib:.2f} GiB a device")
    assert gib < HBM_GIB[topology]
    check_kernels(compiled.as_text())


@pytest.mark.parametrize(
    ("topology", "quantization", "batch"),
    [
        ("v5e:2x2", "int4", 1),
        ("v6e:2x2", "int8", 8),
        ("v5p:2x2x1", "fp8", 8),
        ("tpu7x:2x2x1", "int8", 32),
    ],
)
def test_mini_compiles_quantised_on_one_chip(topology, quantization, batch):
    compiled = compile_decode(
        ModelConfig.from_name("mini"),
        jnp.bfloat16,
        mesh_of(topology),
        batch=batch,
        canvas=1024,
        quantization=quantization,
        cache_dtype=jnp.int8,
    )
    gib = bytes_on_a_chip(compiled) / 2**30
    print(f"{topology} {quantization} batch {batch}: {gib:.2f} GiB")
    assert gib < HBM_GIB[topology]
    check_kernels(compiled.as_text())
