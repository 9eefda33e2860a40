"""The expert kernel against dense evaluation: routing, weight types, races, meshes, traffic."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.expert_mlp import (
    expert_mlp,
    expert_mlp_reference,
    least_bytes,
    traffic,
    tuning,
)
from pallas_kernels.expert_mlp.kernel import expert_mlp_pallas, index_maps
from pallas_kernels.expert_mlp.routing import sort_pairs
from pallas_kernels.expert_mlp.tuning import Tiles
from pallas_kernels.quantized import QuantizedMatrix, dequantize, quantize

TYPES = (None, "int8", "fp8", "int4")
LAYERS = 2
reference = jax.jit(expert_mlp_reference)
call = jax.jit(expert_mlp, static_argnames="implementation")


def weights_of(seed, experts, dim, ffn, scheme, dtype=jnp.float32):
    """Stacks of gate, up, down; layer 1 is the one to be used, layer 0 is NaN where it can be."""
    rng = np.random.default_rng(seed)
    stacks = []
    for shape in ((dim, ffn), (dim, ffn), (ffn, dim)):
        w = jnp.asarray(rng.normal(size=(LAYERS, experts, *shape)) / shape[0] ** 0.5, dtype)
        if scheme is None:
            stacks.append(w.at[0].set(jnp.nan))
        else:
            matrix = quantize(w, scheme)
            scales = matrix.scales.at[0].set(jnp.nan)
            stacks.append(QuantizedMatrix(matrix.values, scales, scheme, matrix.rows))
    return stacks


def one_layer(stacks):
    return [jax.tree.map(lambda a: a[1], m) for m in stacks]


def routing_of(seed, tokens, experts, k, how):
    """Distinct experts of each token; some tokens dead; the rest as ``how`` says."""
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :k]
    if how == "one":
        ids[:] = experts
        ids[:, 0] = rng.integers(experts)
    elif how == "none":
        ids[:] = experts + rng.integers(0, 3, ids.shape)
    elif how == "few":
        ids = np.where(ids < 2, ids, experts)
    dead = rng.random(tokens) < 0.3
    ids[dead] = experts
    gates = rng.random((tokens, k)).astype(np.float32)
    return jnp.asarray(ids, jnp.int32), jnp.asarray(gates), (ids >= experts).all(1)


def by_hand(x, stacks, ids, gates):
    """One token and one expert at a time, in float64."""
    gate, up, down = (
        np.asarray(dequantize(m) if isinstance(m, QuantizedMatrix) else m, np.float64)
        for m in one_layer(stacks)
    )
    x = np.asarray(x, np.float64)
    out = np.zeros_like(x)
    for token in range(len(x)):
        for expert, weight in zip(np.asarray(ids)[token], np.asarray(gates)[token], strict=True):
            if expert < len(gate):
                g = x[token] @ gate[expert]
                h = g / (1 + np.exp(-g)) * (x[token] @ up[expert])
                out[token] += weight * (h @ down[expert])
    return out


@functools.partial(jax.jit, static_argnames=("tiles", "cores"))
def kernel(x, stacks, ids, gates, tiles, cores):
    touched = sort_pairs(ids, gates, stacks[0].shape[1], tiles.rows)
    return expert_mlp_pallas(x, *stacks, touched, jnp.int32(1), tiles, x.dtype, cores)


def run_kernel(*arguments, **parameters):
    """In the TPU interpreter, whose memory is full of NaN."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(**parameters)):
        try:
            return kernel(*arguments).block_until_ready()
        except Exception:
            pltpu.reset_tpu_interpret_mode_state()
            raise


HOW = st.sampled_from(["spread", "one", "none", "few"])


@pytest.mark.parametrize(
    ("shape", "scheme"),
    [
        ((1, 16, 8, 3, 1), None),
        ((9, 24, 40, 5, 3), "int8"),
        ((9, 24, 40, 5, 3), "fp8"),
        ((33, 128, 64, 4, 2), "int4"),
    ],
)
@hypothesis.settings(max_examples=5)
@hypothesis.given(st.integers(0, 2**16), HOW)
def test_reference_and_xla_equal_a_loop(shape, scheme, seed, how):
    tokens, dim, ffn, experts, k = shape
    stacks = weights_of(seed, experts, dim, ffn, scheme)
    x = jax.random.normal(jax.random.key(seed), (tokens, dim))
    ids, gates, dead = routing_of(seed, tokens, experts, k, how)
    expected = by_hand(x, stacks, ids, gates)
    dense = reference(x, *one_layer(stacks), ids, gates)
    np.testing.assert_allclose(dense, expected, atol=2e-5)
    stacked = call(x, *stacks, ids, gates, layer=jnp.int32(1))
    np.testing.assert_allclose(stacked, expected, atol=2e-5)
    plain = call(x, *one_layer(stacks), ids, gates)
    np.testing.assert_allclose(plain, expected, atol=2e-5)
    for out in (stacked, plain):
        assert (np.asarray(out)[dead] == 0).all()


SHAPES = [
    # M, D, F, E, k, tile rows, tile columns, chunks
    (1, 16, 8, 3, 1, 16, 8, (8, 16)),
    (9, 192, 64, 5, 3, 16, 64, (64, 128)),
    (40, 256, 256, 4, 2, 16, 128, (128, 256)),
    (8, 1280, 128, 3, 2, 64, 128, (128, 256)),  # more rows than one trip of the inner loop
]


CASES = [
    # shape, weights, type, cores: few programs, since each is slow to compile
    (0, None, jnp.float32, 1),
    (1, None, jnp.bfloat16, 2),
    (1, "int4", jnp.float32, 1),
    (1, "fp8", jnp.bfloat16, 1),
    (2, None, jnp.float32, 2),
    (3, "int8", jnp.bfloat16, 1),
    (3, "fp8", jnp.bfloat16, 1),
    (3, "int4", jnp.bfloat16, 1),
    (3, None, jnp.float32, 1),
    (2, "fp8", jnp.bfloat16, 2),
    (2, "int4", jnp.bfloat16, 1),
]


def check(case, seed, how, **parameters):
    shape, scheme, dtype, cores = case
    tokens, dim, ffn, experts, k, rows, columns, chunk = SHAPES[shape]
    stacks = weights_of(seed, experts, dim, ffn, scheme, dtype)
    x = jax.random.normal(jax.random.key(seed), (tokens, dim)).astype(dtype)
    ids, gates, dead = routing_of(seed, tokens, experts, k, how)
    tiles = Tiles(rows, columns, chunk, 0)
    got = np.asarray(run_kernel(x, stacks, ids, gates, tiles, cores, **parameters), np.float32)
    expected = reference(x.astype(jnp.float32), *one_layer(stacks), ids, gates)
    np.testing.assert_allclose(got, expected, atol=3e-5 if dtype == jnp.float32 else 4e-2)
    assert (got[dead] == 0).all()


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}-{c[2].__name__}-{c[3]}")
@hypothesis.settings(max_examples=4)
@hypothesis.given(st.integers(0, 2**16), HOW)
def test_kernel_equals_reference(case, seed, how):
    check(case, seed, how)


@pytest.mark.parametrize("case", [CASES[4], CASES[-1]], ids=["float32", "int4"])
def test_no_races(case):
    check(
        case,
        3,
        "spread",
        detect_races=True,
        uninitialized_memory="nan",
        out_of_bounds_reads="raise",
    )
    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize("scheme", ["int4", "fp8"])
def test_what_a_tile_leaves_behind_does_no_harm(scheme):
    """A small expert, whose tile holds uninitialised rows, before a large one; F is not 128."""
    stacks = weights_of(0, 3, 192, 80, scheme, jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (24, 192)).astype(jnp.bfloat16)
    ids = jnp.where(jnp.arange(24) < 3, 0, 1)[:, None]
    gates = jnp.ones((24, 1))
    tiles = Tiles(16, 80, (80, 128), 0)
    got = run_kernel(x, stacks, ids, gates, tiles, 1, uninitialized_memory="nan")
    expected = reference(x.astype(jnp.float32), *one_layer(stacks), ids, gates)
    np.testing.assert_allclose(np.asarray(got, np.float32), expected, atol=4e-2)


class Strict(list):
    """Scalar memory: nothing lies before its beginning."""

    def __getitem__(self, i):
        assert i >= 0
        return super().__getitem__(i)


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_index_maps_stay_among_the_touched_experts(cores, count):
    ids = Strict([10, 11, 12, 13, 14])
    visited = set()
    for name in ("columns", "rows", "whole", "flat"):
        for core in range(cores):
            for i in range(max(1, -(-count // cores))):
                visited.add(index_maps(cores)[name](core, i, 0, (7, count), ids)[1])
    assert visited == set(range(10, 10 + max(count, 1)))


def test_fsdp_gathers_one_layer_at_a_time():
    mesh = jax.make_mesh((4,), ("fsdp",), (AxisType.Auto,), devices=jax.devices()[:4])
    place = NamedSharding(mesh, P(None, None, "fsdp", None))
    stacks = [jax.device_put(jnp.ones((6, 4, 32, 32)), place)] * 3
    x, ids, gates = jnp.ones((8, 32)), jnp.zeros((8, 2), jnp.int32), jnp.ones((8, 2))

    def layers(x, *stacks):
        def body(i, x):
            return expert_mlp(x, *stacks, ids, gates, layer=i)

        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.lax.fori_loop(0, 6, body, x)

    text = jax.jit(layers).lower(x, *stacks).compile().as_text()
    gathered = [line for line in text.splitlines() if " all-gather(" in line]
    assert gathered
    assert not any("f32[6," in line for line in gathered)


def test_wrong_calls_say_so():
    stacks = weights_of(0, 3, 16, 8, None)
    x, ids, gates = jnp.ones((2, 16)), jnp.zeros((2, 1), int), jnp.ones((2, 1))
    with pytest.raises(ValueError, match="has no gradient"):
        expert_mlp(x, *one_layer(stacks), ids, gates, implementation="pallas")
    with pytest.raises(ValueError, match="without `layer`"):
        expert_mlp(x, *stacks, ids, gates)
    with pytest.raises(ValueError, match="does not fit gate"):
        expert_mlp(x, stacks[0], stacks[2], stacks[2], ids, gates, layer=jnp.int32(0))
    with pytest.raises(ValueError, match="D = 16"):
        expert_mlp(jnp.ones((2, 8)), *stacks, ids, gates, layer=jnp.int32(0))
    many = jnp.ones((tuning.MAX_TOKENS + 1, 16))
    with pytest.raises(ValueError, match="split them"):
        expert_mlp(
            many,
            *stacks,
            jnp.zeros((len(many), 1), int),
            jnp.ones((len(many), 1)),
            layer=jnp.int32(0),
            implementation="pallas",
        )


def test_the_forced_kernel_runs_through_the_api():
    """Also the choice of tiles, which the other tests fix."""
    stacks = weights_of(0, 3, 16, 8, None)
    x = jax.random.normal(jax.random.key(0), (9, 16))
    ids, gates, _ = routing_of(0, 9, 3, 2, "spread")
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        got = call(x, *stacks, ids, gates, layer=jnp.int32(1), implementation="pallas")
    np.testing.assert_allclose(got, reference(x, *one_layer(stacks), ids, gates), atol=2e-5)


MESHES = [
    ({"expert": 2, "tensor": 2}, None),
    ({"data": 2, "expert": 2, "tensor": 2}, "int8"),
    ({"fsdp": 2, "expert": 4}, "fp8"),
    ({"tensor": 2}, "int4"),
    ({"tensor": 8}, "fp8"),  # blocks that do not divide: not spread
]


@pytest.mark.parametrize(("axes", "scheme"), MESHES)
def test_sharded_equals_unsharded(axes, scheme):
    stacks = weights_of(1, 4, 128, 256, scheme)
    x = jax.random.normal(jax.random.key(0), (6, 128))
    ids, gates, dead = routing_of(1, 6, 4, 2, "spread")
    expected = reference(x, *one_layer(stacks), ids, gates)
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), (AxisType.Auto,) * len(axes))
    with jax.set_mesh(mesh):
        got = np.asarray(call(x, *stacks, ids, gates, layer=jnp.int32(1)))
    np.testing.assert_allclose(got, expected, atol=2e-5)
    assert (got[dead] == 0).all()


def test_the_kernel_under_a_mesh():
    stacks = weights_of(1, 4, 16, 8, None)
    x = jax.random.normal(jax.random.key(0), (6, 16))
    ids, gates, _ = routing_of(1, 6, 4, 2, "spread")
    mesh = jax.make_mesh((2,), ("expert",), (AxisType.Auto,))
    with jax.set_mesh(mesh), pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        got = call(x, *stacks, ids, gates, layer=jnp.int32(1), implementation="pallas")
    np.testing.assert_allclose(got, reference(x, *one_layer(stacks), ids, gates), atol=2e-5)


@pytest.mark.parametrize("scheme", TYPES)
def test_traffic_is_near_the_least(scheme):
    """At the mini shape, counted through the kernel's own block index maps."""
    rng = np.random.default_rng(0)
    for tokens, most in ((32, 1.02), (256, 1.02), (1024, 1.05)):
        ids = np.argsort(rng.random((tokens, 256)), axis=1)[:, :8]
        arguments = (ids, 2048, 512, 256, scheme)
        touched = len(np.unique(ids))
        assert touched == 256 or 140 < touched < 190
        for cores in (1, 2):
            ratio = traffic(*arguments, cores=cores) / least_bytes(*arguments)
            assert 1 <= ratio < (most if cores == 1 else 1.1), (tokens, cores, ratio)
    assert traffic(np.full((4, 8), 256), 2048, 512, 256, scheme) < 2**24
