"""The confidence head against the dense reference, and the reference against plain numpy."""

import functools
import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, example, given, settings
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType

from pallas_kernels.confidence_head import (
    confidence_head,
    confidence_head_reference,
    least_bytes,
    traffic,
    tuning,
    xla,
)
from pallas_kernels.quantized import SCHEMES, dequantize, quantize


@pytest.fixture
def small_tiles(monkeypatch):
    """Many tiles, chunks and partitions at toy sizes."""
    monkeypatch.setattr(tuning, "_COLUMNS", 256)
    monkeypatch.setattr(tuning, "_COLUMNS_OF_FEW_ROWS", 128)
    monkeypatch.setattr(tuning, "_ROWS", 32)
    monkeypatch.setattr(tuning, "_TILE_BYTES", 1 << 16)
    monkeypatch.setattr(xla, "_MAX_SCORES", 1)


def problem(m, d, v, seed=0, whole=False):
    """Hidden, head, banned, penalised, penalty; ``whole``: small integers, so sums are exact."""
    rng = np.random.default_rng(seed)
    draw = (lambda *s: rng.integers(-2, 3, s)) if whole else rng.standard_normal
    hidden, head = draw(m, d) if whole else draw((m, d)), draw(d, v) if whole else draw((d, v))
    banned = np.where(rng.random(m) < 0.5, rng.integers(0, v, m), -1)
    penalised = np.where(rng.random(m) < 0.5, rng.integers(0, v, m), -1)
    penalty = rng.choice([0.0, 1.0, 3.5, np.inf], m)
    return (
        jnp.asarray(hidden, jnp.float32),
        jnp.asarray(head, jnp.float32),
        {
            "banned": jnp.asarray(banned, jnp.int32),
            "penalised": jnp.asarray(penalised, jnp.int32),
            "penalty": jnp.asarray(penalty, jnp.float32),
        },
    )


reference = jax.jit(confidence_head_reference)


def run(implementation, hidden, head, interpret=None, **options):
    # A new function each time: tests change the tiles behind jit's back.
    function = jax.jit(functools.partial(confidence_head, implementation=implementation, **options))
    if implementation != "pallas":
        return function(hidden, head)
    with pltpu.force_tpu_interpret_mode(interpret or pltpu.InterpretParams()):
        return jax.block_until_ready(function(hidden, head))


def assert_equal(result, expected, rtol=2e-5, ids=True):
    for name in result._fields:
        a, b = (np.asarray(getattr(x, name)) for x in (result, expected))
        assert a.shape == b.shape
        if name not in ("token", "runner_up"):
            np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol, err_msg=name)
        elif ids:
            np.testing.assert_array_equal(a, b, err_msg=name)


def test_reference_against_plain_python():
    hidden, head, options = problem(7, 4, 9, whole=True)
    result = reference(hidden, head, **options)
    scores = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
    for i, row in enumerate(scores):
        if options["penalised"][i] >= 0:
            row[options["penalised"][i]] -= float(options["penalty"][i])
        if options["banned"][i] >= 0:
            row[options["banned"][i]] = -math.inf
        order = sorted(range(len(row)), key=lambda j: (-row[j], j))
        p = np.exp(row - row.max())
        total, p = p.sum(), p / p.sum()
        assert (result.token[i], result.runner_up[i]) == (order[0], order[1])
        np.testing.assert_allclose(result.probability[i], p[order[0]], rtol=1e-6)
        np.testing.assert_allclose(result.runner_up_probability[i], p[order[1]], rtol=1e-6)
        np.testing.assert_allclose(result.logsumexp[i], row.max() + math.log(total), rtol=1e-6)
        entropy = -sum(x * math.log(x) for x in p if x > 0)
        np.testing.assert_allclose(result.entropy[i], entropy, rtol=1e-5, atol=1e-6)


def check(implementation, m, d, v, seed=0, adjusted=True):
    with pytest.MonkeyPatch.context() as patch:
        small_tiles.__wrapped__(patch)
        hidden, head, options = problem(m, d, v, seed, whole=True)
        options = options if adjusted else {}
        result = run(implementation, hidden, head, **options)
    assert_equal(result, reference(hidden, head, **options))


SHAPES = {
    "m": st.integers(1, 70),
    "d": st.sampled_from([8, 64, 136]),
    "v": st.integers(1, 700),
    "seed": st.integers(0, 99),
    "adjusted": st.booleans(),
}


@settings(max_examples=1, phases=[Phase.explicit, Phase.generate])  # an interpreted run: a second
@given(**SHAPES)
@example(m=64, d=64, v=512, seed=1, adjusted=True)  # no ragged tile
@example(m=64, d=64, v=513, seed=1, adjusted=False)  # one column in the last
def test_kernel_equals_reference(m, d, v, seed, adjusted):
    check("pallas", m, d, v, seed, adjusted)


@settings(max_examples=5)
@given(**SHAPES)
@example(m=40, d=8, v=1, seed=0, adjusted=True)  # the only column, banned or not
@example(m=2, d=8, v=2049, seed=1, adjusted=True)  # the last chunk reaches back
def test_xla_equals_reference(m, d, v, seed, adjusted):
    check("xla", m, d, v, seed, adjusted)


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
def test_ties_go_to_the_lowest_id(implementation, small_tiles):
    """Equal columns in a register, a tile, two tiles, two partitions; a third one further on."""
    copies = [(3, 7, 9), (3, 131, 600), (3, 300, 301), (250, 600, 601), (600, 601, 639), (0, 639)]
    rng = np.random.default_rng(0)
    head = rng.integers(-3, 4, (len(copies), 640)).astype(np.float32)
    for row, columns in zip(head, copies, strict=True):
        row[list(columns)] = 4.0
    result = run(implementation, jnp.eye(len(copies)), jnp.asarray(head))
    assert result.token.tolist() == [columns[0] for columns in copies]
    assert result.runner_up.tolist() == [columns[1] for columns in copies]
    np.testing.assert_array_equal(result.probability, result.runner_up_probability)


@pytest.mark.parametrize("implementation", ["pallas", "xla", None])
def test_all_scores_equal(implementation, small_tiles):
    hidden, head = jnp.zeros((3, 8)), jnp.ones((8, 520))
    result = run(implementation, hidden, head, banned=jnp.array([-1, 0, 1]))
    assert result.token.tolist() == [0, 1, 0]
    assert result.runner_up.tolist() == [1, 2, 2]
    np.testing.assert_allclose(result.entropy, np.log([520, 519, 519]), rtol=1e-6)


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
def test_everything_banned_is_token_zero_and_nan(implementation):
    result = run(implementation, jnp.ones((2, 8)), jnp.ones((8, 1)), banned=jnp.array([0, -1]))
    assert result.token.tolist() == [0, 0]
    assert result.runner_up.tolist() == [-1, -1]
    assert np.isnan(result.probability[0])
    assert result.logsumexp[0] == -np.inf
    assert result.probability[1] == 1
    assert result.entropy[1] == 0


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
def test_a_confident_probability_keeps_its_last_bits(implementation, small_tiles):
    """exp(max - logsumexp) would be off by 1e-6 here."""
    gap = np.array([18.0, 20.0, 23.0], np.float32)
    hidden = jnp.zeros((3, 8)).at[:, 0].set(gap)
    result = run(implementation, hidden, jnp.zeros((8, 400)).at[0, 300].set(1.0))
    expected = 1 / (1 + 399 * np.exp(-gap.astype(np.float64)))
    np.testing.assert_allclose(result.probability, expected, rtol=2e-7)


@pytest.mark.parametrize(
    ("implementation", "scheme", "dtype"),
    [
        ("pallas", "int8", jnp.float32),
        ("pallas", "int8", jnp.bfloat16),
        ("pallas", "fp8", jnp.float32),
        *[("xla", s, t) for s in SCHEMES for t in (jnp.float32, jnp.bfloat16)],
    ],
)
def test_quantised(implementation, scheme, dtype, small_tiles):
    hidden, head, options = problem(40, 200, 1300, 3)
    hidden = hidden.astype(dtype)
    matrix = quantize(head, scheme)
    full = dequantize(matrix)
    if scheme != "int8":  # int8 values go into the product as they are, the others dequantised
        full = full.astype(dtype)
    expected = reference(hidden, full, **options)
    assert_equal(run(implementation, hidden, matrix, **options), expected, 2e-4)


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_bfloat16_head_transposed(implementation, dtype, small_tiles):
    """Scores are not rounded to bfloat16; a float32 state makes a float32 product."""
    hidden, head, options = problem(40, 200, 600, 4)
    hidden, head = hidden.astype(dtype), head.astype(jnp.bfloat16)
    expected = reference(hidden, head, **options)
    result = run(implementation, hidden, head.T, transposed=True, **options)
    assert_equal(result, expected, 1e-4)


def test_several_row_tiles_and_long_rows(small_tiles, monkeypatch):
    from pallas_kernels.confidence_head import kernel

    monkeypatch.setattr(tuning, "_MAX_ROWS", 32)
    monkeypatch.setattr(kernel, "_SEGMENT", 128)
    hidden, head, options = problem(50, 256, 200, 5, whole=True)
    expected = reference(hidden, head, **options)
    assert_equal(run("pallas", hidden, head, **options), expected)
    matrix = quantize(head, "int8")
    expected = reference(hidden, matrix, **options)
    assert_equal(run("pallas", hidden, matrix, **options), expected, 2e-4, ids=False)


@pytest.mark.parametrize(
    ("m", "d", "v", "dtype", "head"),
    [
        (20, 64, 300, jnp.float32, None),
        (33, 64, 700, jnp.bfloat16, "int8"),
        (70, 64, 129, jnp.bfloat16, None),
    ],
)
def test_no_race_no_stray_read(m, d, v, dtype, head, small_tiles):
    hidden, matrix, options = problem(m, d, v, 6, whole=True)
    hidden = hidden.astype(dtype)
    matrix = quantize(matrix, "int8") if head else matrix.astype(dtype)
    mode = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
    )
    try:
        result = run("pallas", hidden, matrix, interpret=mode, **options)
        assert not interpreter.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    assert_equal(result, reference(hidden, matrix, **options), 1e-4, ids=not head)


@pytest.mark.parametrize(
    ("implementation", "v", "scheme"),
    [
        ("pallas", 512, None),
        ("pallas", 512, "int8"),
        ("xla", 512, None),
        ("xla", 511, None),  # does not divide: every device has it all
        ("xla", 512, "int8"),
        (None, 512, "int8"),
        ("xla", 512, "fp8"),
        ("xla", 448, "fp8"),
    ],
)
def test_sharded(implementation, v, scheme, small_tiles):
    mesh = jax.make_mesh(
        (2, 1, 1, 4), ("data", "fsdp", "expert", "tensor"), axis_types=(AxisType.Auto,) * 4
    )
    hidden, head, options = problem(24, 32, v, 7, whole=True)
    head = head.at[:, 400].set(head[:, 20])  # equal columns on two devices
    hidden = hidden.reshape(4, 6, 32)
    options = {k: x.reshape(4, 6) for k, x in options.items()}
    matrix = head if scheme is None else quantize(head, scheme)
    expected = reference(hidden, matrix, **options)
    with jax.set_mesh(mesh):
        result = run(implementation, hidden, matrix, **options)
    assert_equal(result, expected, 2e-4, ids=scheme is None)


@pytest.mark.parametrize("transposed", [False, True])
def test_sharded_transposed(transposed):
    mesh = jax.make_mesh((1, 8), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    hidden, head, options = problem(6, 32, 64, 8, whole=True)
    expected = reference(hidden, head, **options)
    head = head.T if transposed else head
    with jax.set_mesh(mesh):
        assert_equal(run("xla", hidden, head, transposed=transposed, **options), expected)


@pytest.mark.parametrize("d", [2048, 4096])
@pytest.mark.parametrize("m", [32, 256, 1024])
@pytest.mark.parametrize("head", [jnp.bfloat16, jnp.int8])
def test_traffic(m, d, head):
    least = least_bytes(m, d, 157184, head=head)
    assert least <= traffic(m, d, 157184, head=head) <= 1.05 * least


def test_large_problems_never_hold_the_logits():
    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((1024, 64), (64, 157184))]
    function = jax.jit(functools.partial(confidence_head, implementation="xla"))
    temporary = function.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 1024 * 157184 * 4 / 2


def test_errors_say_what_to_do():
    hidden, head = jnp.zeros((2, 8)), jnp.zeros((16, 8))
    with pytest.raises(ValueError, match=r"\(16, 8\) is not \[8, V\]"):
        confidence_head(hidden, head)
    with pytest.raises(ValueError, match="give both or neither"):
        confidence_head(hidden, head.T, penalised=jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match=r"quantise head\.T"):
        confidence_head(hidden, quantize(head, "int8"), transposed=True)
