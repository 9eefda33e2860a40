"""An import holds the weights once: the peak of a process of its own, mapped pages included."""

import pytest

from llada_jax.bench.load import bench_load


@pytest.mark.parametrize("merged", [False, True])
def test_peak_of_an_import(merged):
    result = bench_load(0.3, merged)
    assert result["bytes"] > 290e6
    assert 0.9 < result["increase_over_size"] < 1.3
