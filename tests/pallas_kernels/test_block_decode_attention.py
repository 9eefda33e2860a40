"""Decode attention: the reference against a loop, both implementations against the reference."""

import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType

from pallas_kernels.block_decode_attention import (
    block_decode_attention,
    least_bytes,
    reference,
    traffic,
    tuning,
)

LAYER = 1


def make(seed, lengths, *, T=8, N=4, K=2, H=16, S=96, dtype=jnp.float32, int8=False, **fresh):
    """Operands whose cache holds NaN beyond each row's length."""
    rng = np.random.default_rng(seed)
    batch = len(lengths)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    query, key, value = draw(batch, T, N, H), draw(batch, K, T, H), draw(batch, K, T, H)
    cache, scales = draw(2, 2, batch, K, S, H), None
    if int8:
        cache = np.clip(np.round(cache * 40), -127, 127).astype(np.int8)
        scales = np.abs(draw(2, 2, batch, K, S)) / 40
    for row, length in enumerate(lengths):
        (cache if scales is None else scales)[:, :, row, :, length:] = np.nan
    options = {name: jnp.asarray(x) for name, x in fresh.items() if x is not None}
    if "causal" in options:
        options["block_length"] = 4
    if scales is not None:
        options["cache_scales"] = tuple(jnp.asarray(scales))
    cache = jnp.asarray(cache, jnp.int8 if int8 else dtype)
    operands = (jnp.asarray(x, dtype) for x in (query, key, value))
    return (*operands, *cache, jnp.asarray(lengths, jnp.int32), LAYER), options


def pallas(*operands, **options):
    return block_decode_attention(*operands, implementation="pallas", **options)


kernel = jax.jit(pallas, static_argnames="block_length")  # compiled once for each set of shapes


def interpreted(operands, options, **params):
    run = pallas if params else kernel
    try:
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(**params)):
            return np.asarray(run(*operands, **options), np.float32)
    except Exception:
        pltpu.reset_tpu_interpret_mode_state()
        raise


def check(operands, options, tolerance=2e-6, **params):
    # float32 (eps 1.2e-7): sums of up to some 700 weights in another order, errors of about
    # sqrt(700) / 2 eps = 1.6e-6 relative to the result, and as much of the values cancelled.
    expected = np.asarray(reference(*operands, **options), np.float32)
    assert np.isfinite(expected).all()
    xla = block_decode_attention(*operands, implementation="xla", **options)
    for got in (np.asarray(xla, np.float32), interpreted(operands, options, **params)):
        np.testing.assert_allclose(got, expected, atol=tolerance, rtol=2e-6)


@pytest.fixture
def small_tiles(monkeypatch):
    """Full tiles and parts of tiles at toy sizes."""
    monkeypatch.setattr(tuning, "_TILE", 256)
    monkeypatch.setattr(tuning, "_UNIT", 256)


@pytest.mark.parametrize("int8", [False, True])
def test_reference_against_a_loop(int8):
    lengths, seen, causal = [0, 3, 7], [8, 0, 6], [True, False, True]
    operands, options = make(
        0, lengths, S=7, int8=int8, fresh_length=np.array(seen), causal=np.array(causal)
    )
    query, key, value, keys, values = (np.asarray(x, np.float64) for x in operands[:5])
    if int8:
        scales = [np.asarray(s, np.float64)[..., None] for s in options["cache_scales"]]
        keys, values = keys * scales[0], values * scales[1]
    got = np.asarray(reference(*operands, **options))
    for row in range(3):
        for t in range(8):
            for head in range(4):
                pairs = [
                    (keys[LAYER, row, head // 2, s], values[LAYER, row, head // 2, s])
                    for s in range(lengths[row])
                ]
                pairs += [
                    (key[row, head // 2, j], value[row, head // 2, j])
                    for j in range(seen[row])
                    if not causal[row] or j // 4 <= t // 4
                ]
                expected = np.zeros(16)
                odds = [math.exp(query[row, t, head] @ k / 4) for k, _ in pairs]
                for odd, (_, v) in zip(odds, pairs, strict=True):
                    expected += odd / sum(odds) * v
                np.testing.assert_allclose(got[row, t, head], expected, atol=1e-5)


@given(st.data())
@settings(max_examples=5)
def test_one_partial_tile(data):
    lengths = data.draw(st.lists(st.integers(0, 96), min_size=3, max_size=3))
    seen = data.draw(st.lists(st.integers(0, 8), min_size=3, max_size=3))
    causal = data.draw(st.lists(st.booleans(), min_size=3, max_size=3))
    check(*make(1, lengths, fresh_length=np.array(seen), causal=np.array(causal)))


@given(st.lists(st.integers(0, 672), min_size=3, max_size=3))
@settings(max_examples=3)
def test_several_tiles(lengths):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "_TILE", 256)
        patch.setattr(tuning, "_UNIT", 256)
        check(*make(2, lengths, S=672))


def test_edges_of_tiles(small_tiles):
    """Rows of whole tiles, of none, of one position more and less, the whole cache."""
    check(*make(3, [0, 512, 257, 255, 0], S=544))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_int8_cache(small_tiles, dtype):
    tolerance = 2e-6 if dtype == jnp.float32 else 0.04
    check(*make(4, [300, 0, 544], S=544, dtype=dtype, int8=True), tolerance=tolerance)


def test_bfloat16(small_tiles):
    check(*make(5, [300, 31, 512], S=544, dtype=jnp.bfloat16), tolerance=0.01)


def test_prefill_chunk(small_tiles):
    """Several chunks of queries, all rows causal, more fresh keys than one piece."""
    operands, options = make(6, [288, 64], T=136, S=288, causal=np.array([True, True]))
    check(operands, options)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "length", "capacity"), [(3, 1, 1, 5), (6, 3, 24, 64)]
)
def test_odd_shapes(heads, kv_heads, length, capacity):
    lengths = [0, capacity // 2, capacity]
    check(*make(7, lengths, T=length, N=heads, K=kv_heads, H=8, S=capacity))


def test_two_cores(small_tiles, monkeypatch):
    monkeypatch.setattr("pallas_kernels.block_decode_attention.call.cores_here", lambda: 2)
    check(*make(8, [300, 0, 257], S=320, int8=True))


def test_races_and_uninitialized_memory(small_tiles):
    operands, options = make(9, [300, 0, 512], S=512, int8=True)
    check(
        operands,
        options,
        detect_races=True,
        uninitialized_memory="nan",
        out_of_bounds_reads="raise",
    )
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    races = interpret_pallas_call.races
    assert races is not None
    assert not races.races_found


@pytest.mark.parametrize(
    "sizes", [{"data": 2}, {"tensor": 2}, {"data": 2, "tensor": 2}, {"expert": 2}]
)
@pytest.mark.parametrize("int8", [False, True])
def test_sharded_equals_unsharded(sizes, int8):
    operands, options = make(
        10, [0, 96, 5, 40], int8=int8, fresh_length=np.array([8, 3, 0, 8]), causal=np.arange(4) > 1
    )
    plain = block_decode_attention(*operands, implementation="xla", **options)
    axes = ("data", "fsdp", "expert", "tensor")
    shape = tuple(sizes.get(a, 1) for a in axes)
    mesh = jax.make_mesh(
        shape, axes, axis_types=(AxisType.Auto,) * 4, devices=jax.devices()[: math.prod(shape)]
    )
    with jax.set_mesh(mesh):
        sharded = jax.jit(lambda *a: block_decode_attention(*a, **options))(*operands)
    np.testing.assert_allclose(sharded, plain, atol=1e-6)


def test_sharded_kernel():
    operands, options = make(11, [0, 70])
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    expected = reference(*operands, **options)
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(interpreted(operands, options), expected, atol=2e-6)


@given(
    st.sampled_from([16, 32]),
    st.sampled_from([32, 64, 256]),
    st.lists(st.integers(900, 4096), min_size=1, max_size=8),
    st.sampled_from([jnp.bfloat16, jnp.int8]),
    st.sampled_from([1, 2]),
)
def test_traffic_stays_near_the_least(heads, length, lengths, cache_dtype, cores):
    shape = (len(lengths), length, heads, 128)
    moved = traffic(shape, 4, 4096, lengths, cache_dtype=cache_dtype, cores=cores)
    least = least_bytes(shape, 4, lengths, cache_dtype=cache_dtype)
    assert least <= moved <= 1.1 * least


@given(st.integers(1, 4096))
def test_pieces_of_a_tile_cover_the_row_and_little_more(length):
    tiles = tuning.tiling((1, 32, 16, 128), 4, 4096, 2, 2)
    positions = 0
    for start in range(0, length, tiles.tile):
        at = 0
        for offset, size in tiles.copies(length, start, 4096):
            assert offset == at
            at += size
        positions += at
    assert length <= positions < length + 32


def test_too_many_fresh_tokens_for_the_kernel():
    """By default XLA takes them."""
    struct = jax.ShapeDtypeStruct
    query, fresh = struct((1, 1 << 15, 16, 128), jnp.bfloat16), (1, 4, 1 << 15, 128)
    fresh, cache = struct(fresh, jnp.bfloat16), struct((1, 1, 4, 64, 128), jnp.bfloat16)
    operands = query, fresh, fresh, cache, cache, struct((1,), jnp.int32)
    out = jax.eval_shape(block_decode_attention, *operands)
    assert out.shape == query.shape
    with pytest.raises(ValueError, match="do not fit"):
        jax.eval_shape(pallas, *operands)


def test_errors():
    operands, _ = make(12, [1])
    with pytest.raises(ValueError, match="block_length"):
        block_decode_attention(*operands, causal=jnp.array([True]))
    with pytest.raises(ValueError, match="cache_scales"):
        block_decode_attention(*operands, cache_scales=(jnp.ones((2, 1, 2, 96)),) * 2)
    with pytest.raises(ValueError, match="do not divide"):
        block_decode_attention(operands[0][:, :, :3], *operands[1:])
