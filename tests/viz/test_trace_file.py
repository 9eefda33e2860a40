import json

import numpy as np
import pytest

from llada_jax.decoding import Trace
from llada_jax.generation import Generation
from llada_jax.viz import read_traces, write_traces
from llada_jax.viz.trace_file import TraceFileError
from tests.viz.conftest import MASK, make_step


def generation(trace):
    return Generation((0,), (1, 2), "bc", "length", (0.5, 0.5), 1, 0, 0, trace)


@pytest.fixture
def trace():
    steps = (make_step([0, MASK, MASK, 3], [0, 1, MASK, 2]),)
    return Trace((0,), 4, MASK, 4, steps)


def test_round_trip(tmp_path, trace):
    file = tmp_path / "t.json"
    write_traces(file, [generation(trace)], {1: "b"})
    (back,) = read_traces(file)
    assert (back.prompt_token_ids, back.block_length, back.mask_token_id, back.end) == (
        (0,),
        4,
        MASK,
        4,
    )
    for got, expected in zip(back.steps, trace.steps, strict=True):
        for name, value in vars(expected).items():
            np.testing.assert_array_equal(getattr(got, name), value)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"format": "other", "version": 1}', "\x00", '{"format": "llada_jax.traces"}'],
)
def test_other_files_are_refused_in_one_sentence(tmp_path, content):
    file = tmp_path / "t.json"
    file.write_text(content)
    with pytest.raises(TraceFileError, match=r"t\.json"):
        read_traces(file)


def test_a_later_version_is_named(tmp_path):
    file = tmp_path / "t.json"
    file.write_text(json.dumps({"format": "llada_jax.traces", "version": 9, "traces": []}))
    with pytest.raises(TraceFileError, match="version 9"):
        read_traces(file)


def test_a_generation_without_a_trace_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="return_trace=True"):
        write_traces(tmp_path / "t.json", [generation(None)])
    assert not list(tmp_path.iterdir())
