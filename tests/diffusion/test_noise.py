"""The forward process against its definition."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llada_jax.diffusion import DiffusionConfig, draw_noise, mask_rates, random_tokens, write_draft
from llada_jax.diffusion.noise import span_starts, stratified_uniform
from tests.diffusion.tiny import BLOCK, DENSE, LENGTH, MASK, PAD, ROWS, VOCAB, make_batch

EDITS = DiffusionConfig(
    block_size=BLOCK,
    random_edit_rate=0.4,
    rounds=3,
    noise_range_low=0.2,
    noise_range_high=0.7,
    draft_threshold_low=0.3,
    draft_threshold_high=0.6,
)
PAIRS = DiffusionConfig(
    block_size=BLOCK, complementary=True, noise_level="sequence", random_edit_rate=0.2, rounds=2
)

SPECIAL = (PAD, MASK)


@functools.cache
def drawer(config):
    return jax.jit(lambda key, batch: draw_noise(key, batch, DENSE.config, config))


def draw(config, batch, seed):
    return jax.tree.map(_to_numpy, drawer(config)(jax.random.key(seed), batch))


def _to_numpy(x):
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)


@st.composite
def rows_of_blocks(draw):
    """Documents of some blocks in ``ROWS`` rows, and what is left is padding."""
    layout = []
    for _ in range(ROWS):
        blocks = draw(st.lists(st.integers(1, 5), max_size=4))
        while sum(blocks) * BLOCK > LENGTH:
            blocks.pop()
        layout.append([BLOCK * n for n in blocks])
    return layout


def spans(batch, length):
    """Python's own list of the stretches with one t: ``(row, columns)``."""
    found = {}
    for row, column in np.ndindex(batch["tokens"].shape):
        document, position = batch["document"][row, column], batch["positions"][row, column]
        if document:
            place = (row, document, 0 if length is None else position // length)
            found.setdefault(place, []).append(column)
    return [(place[0], columns) for place, columns in found.items()]


@functools.cache
def spreader(length):
    return jax.jit(lambda k, p, d: stratified_uniform(k, span_starts(p, length), d))


@given(rows_of_blocks(), st.sampled_from([BLOCK, 8, None]), st.integers(0, 2**31))
@settings(max_examples=60)
def test_stratified_uniform_has_one_value_in_each_interval(layout, length, seed):
    batch = make_batch(layout)
    got = spreader(length)(jax.random.key(seed), batch["positions"], batch["document"])
    got = np.asarray(got, np.float64)
    assert ((got >= 0) & (got < 1)).all()
    values = []
    for row, columns in spans(batch, length):
        assert len(set(got[row, columns])) == 1
        values.append(got[row, columns[0]])
    intervals = np.floor(np.sort(values) * len(values))
    np.testing.assert_array_equal(intervals, np.arange(len(values)))


def test_strata_are_dealt_at_random():
    """Every span gets every part of the range over many draws."""
    batch = make_batch([[16]] * ROWS)
    got = np.stack([
        spreader(8)(jax.random.key(i), batch["positions"], batch["document"])[:, ::8][:, :2]
        for i in range(100)
    ])  # fmt: skip
    np.testing.assert_allclose(got.mean(0), 0.5, atol=0.12)  # 4 sigma
    assert len(np.unique(got)) > 1500  # jittered, no fixed grid


@pytest.mark.parametrize("level", ["block", "sequence"])
def test_rates_stay_in_the_band(level, batch):
    config = DiffusionConfig(
        block_size=BLOCK, noise_range_low=0.3, noise_range_high=0.8, noise_level=level
    )
    rates_of = jax.jit(lambda key, p, d: mask_rates(key, p, d, config))
    for seed in range(10):
        rates = np.asarray(rates_of(jax.random.key(seed), batch["positions"], batch["document"]))
        assert ((rates >= 0.3) & (rates <= 0.8)).all()
        for row, columns in spans(batch, BLOCK if level == "block" else None):
            assert len(set(rates[row, columns])) == 1
        assert rates[batch["document"] > 0].min() < 0.35  # the band is used up to its ends
        assert rates[batch["document"] > 0].max() > 0.75


def check_common(config, batch, noise):
    supervised = batch["supervised"] & (batch["document"] > 0)
    for copy in range(config.copies):
        noisy = noise.noisy[:, copy]
        changed = noisy != batch["tokens"]
        assert not changed[~supervised].any()
        assert not np.isin(noisy[changed & (noisy != MASK)], SPECIAL).any()
    assert ((noise.noisy >= 0) & (noise.noisy < VOCAB)).all()


@given(rows_of_blocks(), st.integers(0, 2**31))
@settings(max_examples=40)
def test_noise_touches_supervised_tokens_only(layout, seed):
    batch = make_batch(layout, seed)
    noise = draw(EDITS, batch, seed)
    check_common(EDITS, batch, noise)
    real = batch["document"][:, None] > 0
    assert ((noise.rates >= 0.2) & (noise.rates <= 0.7))[real].all()
    assert noise.noisy.shape == noise.rates.shape == (ROWS, 1, LENGTH)
    assert noise.fill_above.shape == noise.edit_above.shape == (ROWS, 2, 1, LENGTH)
    assert ((noise.fill_above >= 0.3) & (noise.fill_above <= 0.6)).all()
    edits = noise.edit_above
    assert ((edits >= 0) & (edits <= 0.6) | (edits > 1)).all()
    for row, columns in spans(batch, BLOCK):
        for above in (noise.fill_above, edits):
            assert (above[row][..., columns] == above[row][..., columns[:1]]).all()


@given(rows_of_blocks(), st.integers(0, 2**31))
@settings(max_examples=40)
def test_complementary_copies_mask_every_supervised_token_once(layout, seed):
    batch = make_batch(layout, seed)
    noise = draw(PAIRS, batch, seed)
    check_common(PAIRS, batch, noise)
    times = (noise.noisy == MASK).sum(1)
    np.testing.assert_array_equal(times, batch["supervised"] & (batch["document"] > 0))
    np.testing.assert_array_equal(noise.rates[:, 1], 1 - noise.rates[:, 0])
    for row, columns in spans(batch, None):
        assert len(set(noise.rates[row, 0, columns])) == 1


def test_supervised_padding_is_not_touched(batch):
    batch = batch | {"supervised": np.ones_like(batch["supervised"])}
    check_common(EDITS, batch, draw(EDITS, batch, 5))


def test_masked_share_is_the_rate(batch):
    batch = make_batch([[LENGTH]] * ROWS)
    batch["supervised"][:] = True
    drawn = [draw(EDITS, batch, seed) for seed in range(60)]
    rates = np.concatenate([n.rates.ravel() for n in drawn])
    masked = np.concatenate([(n.noisy == MASK).ravel() for n in drawn])
    for low in np.arange(0.2, 0.7, 0.1):
        inside = (rates >= low) & (rates < low + 0.1)
        sigma = 0.5 / np.sqrt(inside.sum())
        assert abs(masked[inside].mean() - rates[inside].mean()) < 4 * sigma


def test_share_of_edits(batch):
    """Of the visible supervised tokens; a drawn token is the right one once in 38 times."""
    visible = edited = blocks = edit_blocks = 0
    for seed in range(60):
        noise = draw(EDITS, batch, seed)
        seen = batch["supervised"] & (noise.noisy[:, 0] != MASK)
        visible += seen.sum()
        edited += (seen & (noise.noisy[:, 0] != batch["tokens"])).sum()
        blocks += noise.edit_above[..., ::BLOCK].size
        edit_blocks += (noise.edit_above[..., ::BLOCK] < 1).sum()
    assert abs(edited / visible - 0.4 * 37 / 38) < 0.03
    assert abs(edit_blocks / blocks - EDITS.draft_edit_rate) < 0.03


@given(st.sets(st.integers(0, 11), max_size=11), st.integers(0, 2**31))
@settings(max_examples=30)
def test_random_tokens_reach_everything_but_the_special(special, seed):
    got = np.asarray(random_tokens(jax.random.key(seed), (500,), 12, [*special, *special]))
    assert set(got) == set(range(12)) - special


def test_random_tokens_are_uniform():
    counts = np.bincount(random_tokens(jax.random.key(0), (20000,), 23, [0, 7, 8, 22]))
    expected = 20000 / 19
    assert (counts[[0, 7, 8]] == 0).all()
    used = counts[counts > 0]
    assert len(used) == 19
    assert ((used - expected) ** 2 / expected).sum() < 42.3  # chi square, 18 degrees, 0.1 %


def test_equal_keys_equal_noise(batch):
    for config in (EDITS, PAIRS):
        first, again, other = (draw(config, batch, seed) for seed in (1, 1, 2))
        jax.tree.map(np.testing.assert_array_equal, first, again)
        assert (first.noisy != other.noisy).any()
        assert (first.row_keys != other.row_keys).any()


def test_sharded_noise_is_the_same(batch):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    key = jax.device_put(jax.random.key(4), NamedSharding(mesh, PartitionSpec()))
    sharded = drawer(PAIRS)(key, jax.device_put(batch, rows))
    assert len(sharded.noisy.sharding.device_set) == 8
    sharded = jax.tree.map(_to_numpy, sharded)
    jax.tree.map(np.testing.assert_array_equal, sharded, draw(PAIRS, batch, 4))


draft = jax.jit(functools.partial(write_draft, mask_token_id=MASK))


@given(st.integers(0, 2**31))
@settings(max_examples=30)
def test_write_draft(seed):
    """Γ: a mask is filled where the confidence exceeds its threshold; Δ: the same for edits."""
    rng = np.random.default_rng(seed)
    shape = (2, 2, 12)
    noisy = np.where(rng.random(shape) < 0.5, MASK, rng.integers(0, 5, shape)).astype(np.int32)
    best = rng.integers(0, 5, shape).astype(np.int32)
    grid = [0.0, 0.25, 0.5, 2.0]  # equal values too: "exceeds" is strict
    confidence, fill, edit = (rng.choice(grid, shape).astype(np.float32) for _ in range(3))
    got = np.asarray(draft(noisy, best, np.minimum(confidence, 1), fill, edit))
    for place in np.ndindex(shape):
        above = fill[place] if noisy[place] == MASK else edit[place]
        moved = min(confidence[place], 1) > above
        assert got[place] == (best[place] if moved else noisy[place])
