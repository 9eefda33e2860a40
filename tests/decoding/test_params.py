"""What users type, rightly and wrongly."""

import numpy as np
import pytest

from llada_jax import SamplingError, SamplingParams
from llada_jax.decoding.params import FIELD_NAMES


def test_presets():
    quality, speed, v20 = SamplingParams.quality(), SamplingParams.speed(), SamplingParams.v20()
    assert (quality.threshold, quality.editing_threshold, quality.max_post_steps) == (0.7, 0.5, 16)
    assert (speed.threshold, speed.editing_threshold, speed.max_post_steps) == (0.5, 0.0, 16)
    assert (v20.threshold, v20.editing_threshold, v20.steps) == (0.95, None, 32)
    assert SamplingParams() == quality
    assert SamplingParams.speed(threshold=0.4).threshold == 0.4
    assert SamplingParams.from_mode("v20", max_tokens=5) == SamplingParams.v20(max_tokens=5)
    assert SamplingParams(editing_threshold=0.0).editing_threshold == 0.0


def test_aliases():
    ours = SamplingParams(max_tokens=7, editing_threshold=0.2, max_post_steps=3, num_to_transfer=2)
    for length in ("gen_length", "max_new_tokens"):
        assert ours == SamplingParams(
            **{length: 7}, edit_threshold=0.2, max_post_edit_steps=3, num_to_transfer=2
        )
    assert SamplingParams.speed(gen_length=9).max_tokens == 9
    assert SamplingParams(num_inference_steps=8).steps == 8
    with pytest.raises(SamplingError, match="max_tokens is given twice"):
        SamplingParams(max_tokens=3, gen_length=4)


def test_stop_is_a_tuple():
    assert SamplingParams(stop="x").stop == ("x",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop=None, stop_token_ids=None) == SamplingParams()
    assert SamplingParams(stop_token_ids=5).stop_token_ids == (5,)
    assert SamplingParams(max_tokens=np.int64(3), threshold=np.float32(0.5)).max_tokens == 3
    assert hash(SamplingParams(stop_token_ids=[1]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"threshhold": 0.5}, "no field 'threshhold'; did you mean 'threshold'?"),
        ({"zzz": 1}, "SamplingParams has no field 'zzz'; known are max_tokens"),
        ({"threshold": 1.5}, "threshold = 1.5 must be a number from 0 to 1"),
        ({"threshold": -0.1}, "threshold = -0.1"),
        ({"threshold": None}, "threshold = None"),
        ({"threshold": float("nan")}, "threshold = nan"),
        ({"threshold": "0.5"}, "threshold = '0.5' must be a number"),
        ({"editing_threshold": 1.1}, "editing_threshold = 1.1 .*; None switches it off"),
        ({"block_length": 0}, "block_length = 0 must be an integer from 1 to 512"),
        ({"block_length": 24}, "block_length = 24 is not supported.*use 16 or 32"),
        ({"seed": -1}, "seed = -1 must be an integer from 0"),
        ({"max_tokens": 0}, "max_tokens = 0 must be an integer of at least 1"),
        ({"max_tokens": 2.5}, "max_tokens = 2.5 must be an integer"),
        ({"max_tokens": True}, "max_tokens = True"),
        ({"temperature": -1}, "temperature = -1"),
        ({"temperature": float("inf")}, "temperature = inf"),
        ({"stop_token_ids": [True]}, "stop_token_ids holds True"),
        ({"top_p": 2}, "top_p = 2"),
        ({"multi_block_window": 2, "editing_threshold": None}, "set an editing_threshold"),
        ({"stop": [""]}, "non-empty strings"),
        ({"stop_token_ids": [-4]}, "stop_token_ids holds -4"),
        ({"ban_mask": 1}, "ban_mask = 1 must be True or False"),
    ],
)
def test_errors(fields, message):
    with pytest.raises(SamplingError, match=message):
        SamplingParams(**fields)


def test_unknown_mode():
    with pytest.raises(SamplingError, match="mode = 'fast' is not known; use quality, speed, v20"):
        SamplingParams.from_mode("fast")


def test_every_field_is_documented():
    for name in FIELD_NAMES:
        assert f"{name}" in SamplingParams.__doc__
