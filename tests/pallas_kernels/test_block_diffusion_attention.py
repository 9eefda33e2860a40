"""Training attention: the struct against the predicate, both implementations against dense."""

import functools
import re

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType

from pallas_kernels.block_diffusion_attention import (
    BlockDiffusionMask,
    Geometry,
    Tiles,
    api,
    block_diffusion_attention,
    live_tiles,
    reference,
    tile_counts,
    visible_pairs,
)
from pallas_kernels.block_diffusion_attention.kernel import splash_attention, tile_table
from pallas_kernels.block_diffusion_attention.mask import Visible
from pallas_kernels.block_diffusion_attention.tuning import SIZES, tiles_for
from pallas_kernels.block_diffusion_attention.xla import xla_attention

LAYOUTS = [("clean", 1), ("noisy", 1), ("alone", 1), ("joint", 1), ("joint", 2)]


def make_rows(length, documents):
    """Positions and ids of rows of documents with these lengths, cut at the end of the row."""
    positions, document = np.zeros((2, len(documents), length), np.int32)
    for row, lengths in enumerate(documents):
        start = 0
        for number, size in enumerate(lengths, 1):
            size = min(size, length - start)
            positions[row, start : start + size] = np.arange(size)
            document[row, start : start + size] = number
            start += size
    return positions, document


def make_mask(length, documents, block, layout, copies, aligned=False):
    positions, document = (jnp.asarray(x) for x in make_rows(length, documents))
    return BlockDiffusionMask.of(positions, document, block, layout, copies=copies, aligned=aligned)


def make_operands(mask, heads=4, kv_heads=2, head_dim=8, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    g = mask.geometry
    rows, queries, keys = len(mask.document), *(g.length * len(x) for x in (g.queries, g.keys))
    query = rng.normal(size=(rows, queries, heads, head_dim))
    key, value = rng.normal(size=(2, rows, kv_heads, keys, head_dim))
    return tuple(jnp.asarray(x, dtype) for x in (query, key, value))


@functools.cache
def evaluator(attention):
    """Result and gradients of a weighted sum, compiled once for equal shapes and statics."""

    def both(operands, mask, weight):
        def loss(operands):
            mixed = attention(*operands, mask)
            return (mixed.astype(jnp.float32) * weight).sum(), mixed

        return jax.grad(loss, has_aux=True)(operands)

    return jax.jit(both)


def with_gradients(attention, operands, mask):
    """Result and gradients of a loss that only looks at real tokens."""
    live = np.asarray(mask.query_documents() > 0)[..., None, None]
    weight = np.random.default_rng(1).normal(size=operands[0].shape).astype(np.float32)
    gradients, mixed = evaluator(attention)(operands, mask, np.where(live, weight, 0))
    assert np.isfinite(np.asarray(mixed, np.float32)).all()
    return [np.where(live, mixed, 0), *gradients]


def assert_equals_reference(attention, mask, tolerance=1e-5, **kinds):
    operands = make_operands(mask, **kinds)
    got = with_gradients(attention, operands, mask)
    wanted = with_gradients(reference, operands, mask)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), atol=tolerance, rtol=tolerance
        )


documents_of_two_rows = st.lists(st.lists(st.integers(1, 12), max_size=3), min_size=2, max_size=2)
cases = st.tuples(
    st.sampled_from(LAYOUTS),
    st.sampled_from([1, 12, 17]),  # length: few, so that programs are shared
    st.sampled_from([None, 1, 4, 5]),  # block
    documents_of_two_rows,
)


@given(cases)
@settings(max_examples=25)
def test_dense_pair_by_pair(case):
    (layout, copies), length, block, documents = case
    positions, document = make_rows(length, documents)
    mask = make_mask(length, documents, block, layout, copies)
    got = np.asarray(mask.dense())
    queries, keys = mask.geometry.queries, mask.geometry.keys
    assert got.shape == (len(documents), len(queries) * length, len(keys) * length)
    rule = np.asarray(Visible(mask.geometry)(mask.query_ids()[:, :, None], np.arange(got.shape[2])))
    rule = rule & np.asarray(mask.query_documents()[:, :, None] == mask.key_documents()[:, None])
    size = block or length
    for row in range(len(documents)):
        for q in np.flatnonzero(np.tile(document[row] > 0, len(queries))):
            for k in range(got.shape[2]):
                (q_copy, q_at), (k_copy, k_at) = (
                    (queries[q // length], q % length),
                    (keys[k // length], k % length),
                )
                same = document[row, q_at] == document[row, k_at]
                q_block, k_block = (positions[row, at] // size for at in (q_at, k_at))
                seen = same and (
                    (q_copy == k_copy and q_block == k_block) or (k_copy == 0 and k_block < q_block)
                )
                assert got[row, q, k] == rule[row, q, k] == seen


@given(cases)
@settings(max_examples=15)
def test_reference_against_numpy(case):
    (layout, copies), length, block, documents = case
    mask = make_mask(length, documents, block, layout, copies)
    query, key, value = (np.asarray(x, np.float64) for x in make_operands(mask))
    got, seen = reference(*make_operands(mask), mask), np.asarray(mask.dense())
    rng = np.random.default_rng(0)
    for row, head in [(0, 0), (len(documents) - 1, 3)]:
        q = rng.integers(query.shape[1])
        scores = key[row, head // 2] @ query[row, q, head] / np.sqrt(8)
        odds = np.where(seen[row, q], np.exp(scores), 0)
        wanted = odds @ value[row, head // 2] / odds.sum()
        np.testing.assert_allclose(got[row, q, head], wanted, rtol=1e-4, atol=1e-5)


@given(cases, st.sampled_from([1, 2, 4]))
@settings(max_examples=15)
def test_live_tiles_are_those_with_a_visible_pair(case, tile):
    (layout, copies), length, block, documents = case
    length = -(-length // tile) * tile
    for aligned in (True, False):
        geometry = Geometry(layout, length, block, copies, aligned)
        live = live_tiles(geometry, tile, tile)
        mask = make_mask(length, [[length]], block, layout, copies, aligned)
        dense = np.asarray(mask.dense()[0])
        assert visible_pairs(geometry) == dense.sum()
        seen = dense.reshape(len(live), tile, -1, tile).any((1, 3))
        if aligned:
            np.testing.assert_array_equal(live, seen)
        other = np.asarray(make_mask(length, documents, block, layout, copies).dense()[0])
        real = np.tile(make_rows(length, documents)[1][0] > 0, len(geometry.queries))
        other = (other & real[:, None]).reshape(len(live), tile, -1, tile).any((1, 3))
        assert aligned or not (other & ~live).any()
        assert not (seen & ~live).any()


def tiled(q, k, v, mask, tile=4):
    """The XLA path with tiles of four."""
    length = mask.geometry.length
    whole = -(-length // tile) * tile
    q, k, v = (api._fill(x, a, length, whole) for x, a in ((q, 1), (k, 2), (v, 2)))
    return api._cut(xla_attention(q, k, v, mask.padded(whole), tile), 1, length, whole)


plain = functools.partial(block_diffusion_attention, implementation="xla")


@pytest.mark.parametrize(("layout", "copies"), LAYOUTS)
@given(st.sampled_from([None, 5]), documents_of_two_rows)
@settings(max_examples=6)
def test_xla(layout, copies, block, documents):
    assert_equals_reference(tiled, make_mask(17, documents, block, layout, copies))


@pytest.mark.parametrize(("layout", "copies"), LAYOUTS)
def test_xla_of_several_tiles(layout, copies):
    mask = make_mask(200, [[70, 100], [200]], 32, layout, copies)
    assert_equals_reference(plain, mask)


def interpreted(q, k, v, mask, tile=128):
    length = mask.geometry.length
    whole = -(-length // tile) * tile
    q, k, v = (api._fill(x, a, length, whole) for x, a in ((q, 1), (k, 2), (v, 2)))
    mixed = splash_attention(q, k, v, mask.padded(whole), Tiles.square(tile), interpret=True)
    return api._cut(mixed, 1, length, whole)


@given(
    st.sampled_from(LAYOUTS),
    st.sampled_from([(128, 32), (96, 5), (250, None)]),
    st.lists(st.integers(1, 150), max_size=4),
)
@settings(max_examples=4)
def test_splash_interpreted(layout, size, documents):
    """Any length, block and documents, aligned or not, forward and backward."""
    length, block = size
    mask = make_mask(length, [documents, [length]], block, *layout)
    assert_equals_reference(interpreted, mask)


@pytest.mark.parametrize("layout", ["noisy", "joint"])
def test_splash_of_aligned_documents(layout):
    """Fewer tiles, the same result."""
    mask = make_mask(256, [[64, 96, 96]], 32, layout, 1, aligned=True)
    live, loose = (
        live_tiles(Geometry(layout, 256, 32, aligned=a), 128, 128).sum() for a in (True, False)
    )
    assert live < loose
    assert_equals_reference(interpreted, mask)
    assert_equals_reference(interpreted, mask, 3e-2, dtype=jnp.bfloat16, heads=2, kv_heads=1)


def test_splash_on_simulated_memory():
    """Race detector on, memory full of NaN, no reads out of bounds."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    mask = make_mask(256, [[100, 64]], 32, "noisy", 1)
    parameters = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
    )
    attention = functools.partial(
        block_diffusion_attention, implementation="pallas", tiles=Tiles.square(128)
    )
    operands = make_operands(mask, heads=2, kv_heads=1)
    try:
        with pltpu.force_tpu_interpret_mode(parameters):
            got = with_gradients(attention, operands, mask)
        assert not interpret_pallas_call.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    for a, b in zip(got, with_gradients(reference, operands, mask), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


def test_tables_are_those_of_splash():
    """What splash itself finds by evaluating the mask on every tile."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as info

    for layout, copies in LAYOUTS:
        geometry = Geometry(layout, 512, 32, copies)
        dense = np.asarray(make_mask(512, [[512]], 32, layout, copies).dense()[0])
        stock = masks.MultiHeadMask([masks.NumpyMask(dense)])
        live = live_tiles(geometry, 128, 128)
        for by_key, process in ((False, info.process_mask), (True, info.process_mask_dkv)):
            wanted, _ = process(stock, (128, 128))
            fetch, run = tile_table(live, by_key)
            np.testing.assert_array_equal(run > 0, np.asarray(wanted.block_mask) > 0)
            np.testing.assert_array_equal(
                np.where(run, fetch, 0), np.where(run, wanted.data_next, 0)
            )
            if run.all():
                assert fetch.dtype == wanted.data_next.dtype


def test_sharded_equals_unsharded():
    """Rows over three axes, heads over the fourth."""
    mask = make_mask(128, [[64, 64], [100], [32] * 4, []], 32, "noisy", 1)
    operands = make_operands(mask)
    mesh = jax.make_mesh(
        (2, 2, 1, 2), ("data", "fsdp", "expert", "tensor"), axis_types=(AxisType.Auto,) * 4
    )
    with jax.set_mesh(mesh):
        got = with_gradients(functools.partial(plain), operands, mask)
    for a, b in zip(got, with_gradients(reference, operands, mask), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


def test_sharded_kernel_equals_unsharded():
    mask = make_mask(128, [[64, 64], [100]], 32, "clean", 1)
    operands = make_operands(mask, heads=2, kv_heads=1)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()), jax.set_mesh(mesh):
        got = jax.jit(functools.partial(block_diffusion_attention, implementation="pallas"))(
            *operands, mask
        )
    live = np.asarray(mask.query_documents() > 0)
    wanted = reference(*operands, mask)
    np.testing.assert_allclose(np.asarray(got)[live], wanted[live], atol=1e-5, rtol=1e-5)


def test_padding_has_no_influence():
    """Whatever stands in padding, what real tokens get and give stays the same, bit by bit."""
    mask = make_mask(96, [[40], [96], []], 8, "noisy", 1)
    dead = np.asarray(mask.key_documents() == 0)
    query, key, value = make_operands(mask)
    before = with_gradients(plain, (query, key, value), mask)
    dirty = [jnp.where(dead[:, None, :, None], 1e3, x).astype(x.dtype) for x in (key, value)]
    after = with_gradients(plain, (query, *dirty), mask)
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("layout", ["clean", "noisy", "joint"])
@pytest.mark.parametrize("length", [2048, 4096, 8192, 32768, 131072])
def test_tiles_visited(layout, length):
    """At most 1.15 times the ideal count; a noisy pass is counted with its clean one."""
    for chip in ("v5e", "v5p", "v6e", "tpu7x", None):
        tiles = tiles_for(Geometry(layout, length, 32), chip)
        for size, other in (tiles.forward, tiles.dkv, tiles.dq):
            assert size == other
            assert size in SIZES
            passes = ("clean", "noisy") if layout == "noisy" else (layout,)
            counts = [tile_counts(Geometry(p, length, 32), size, size) for p in passes]
            assert sum(v for v, _ in counts) <= 1.15 * sum(i for _, i in counts)


def test_heuristic_of_odd_lengths():
    for length in (1, 100, 1000, 3000, 5000):
        tiles = tiles_for(Geometry("noisy", length, 32))
        assert -(-length // tiles.largest) * tiles.largest <= max(128, length * 9 / 8)


@pytest.mark.parametrize(("platform", "implementation"), [("tpu", "pallas"), ("cpu", "xla")])
@pytest.mark.parametrize("length", [32768, 131072])
def test_long_rows_lower_without_a_dense_mask(platform, implementation, length):
    """Forward and backward: nothing in the program is as large as a hundredth of the mask."""
    place = jax.ShapeDtypeStruct((1, length), jnp.int32)
    query = jax.ShapeDtypeStruct((1, length, 4, 128), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((1, 1, 2 * length, 128), jnp.bfloat16)
    mask = BlockDiffusionMask(place, place, "noisy", 32, aligned=True)

    def loss(q, k, v, mask):
        mixed = block_diffusion_attention(q, k, v, mask, implementation=implementation)
        return mixed.astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(query, key, key, mask)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    shapes = set(re.findall(r"tensor<((?:\d+x)+)", text))
    largest = max(np.prod([int(n) for n in s.split("x") if n]) for s in shapes)
    assert largest <= 2 * length * 4 * 128  # the operands


def test_errors_name_the_way_out():
    mask = make_mask(8, [[8]], 4, "noisy", 1)
    query, key, value = make_operands(mask)
    with pytest.raises(ValueError, match="has 8 and 16"):
        block_diffusion_attention(query, key[:, :, :8], value[:, :, :8], mask)
    with pytest.raises(ValueError, match="do not fit"):
        block_diffusion_attention(query[:, :, :3], key, value, mask)
    with pytest.raises(ValueError, match="copy is a row of its own"):
        Geometry("noisy", 8, 4, copies=2)
    with pytest.raises(ValueError, match="fill it up"):
        live_tiles(Geometry("clean", 100, 4), 64, 64)
