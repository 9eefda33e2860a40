"""The key table against the released index and against the twin."""

import gzip
import itertools
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_jax.checkpoint import hf_names, read_config
from llada_jax.checkpoint.keys import pieces, uses_merged_experts
from llada_jax.model.weights import flatten_specs, weight_specs

from .synthetic import VARIANTS, make_config, shapes

RELEASED = Path(__file__).parent.parent / "golden" / "llada2.1-mini"


def released_index():
    with gzip.open(RELEASED / "model.safetensors.index.json.gz", "rt") as stream:
        return json.load(stream)


def test_names_are_exactly_those_of_the_released_index():
    names = hf_names(read_config(RELEASED))
    assert set(names) == set(released_index()["weight_map"])
    assert len(names) == 14_813


def test_sizes_add_up_to_the_released_total():
    names = hf_names(read_config(RELEASED))
    total = sum(
        math.prod(shape) * (4 if name.endswith("expert_bias") else 2)
        for name, shape in names.items()
    )
    assert total == released_index()["metadata"]["total_size"]


def test_merged_names_of_the_released_model():
    names = hf_names(read_config(RELEASED), merged_experts=True)
    assert len(names) == 14_813 - 19 * 3 * 256 + 19 * 3
    assert names["model.layers.1.mlp.experts.gate_proj"] == (256, 512, 2048)
    assert names["model.layers.19.mlp.experts.down_proj"] == (256, 2048, 512)
    assert uses_merged_experts(names)
    assert not uses_merged_experts(hf_names(read_config(RELEASED)))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_names_and_shapes_match_the_twin(variant, merged):
    config = make_config(**VARIANTS[variant])
    assert hf_names(config, merged) == shapes(config, merged)


def test_tensors_are_listed_in_the_order_of_the_model():
    names = list(hf_names(make_config(num_experts=16, num_hidden_layers=12)))
    assert names[0] == "model.word_embeddings.weight"
    assert names[-2:] == ["model.norm.weight", "lm_head.weight"]
    layers = [int(n.split(".")[2]) for n in names if ".layers." in n]
    assert layers == sorted(layers)
    gates = [n for n in names if n.startswith("model.layers.1.mlp.experts.") and "gate_proj" in n]
    assert [int(n.split(".")[5]) for n in gates] == list(range(16))


@settings(max_examples=30, deadline=None)
@given(
    layers=st.integers(1, 4),
    dense=st.integers(0, 4),
    kv=st.integers(1, 3),
    repeat=st.integers(1, 3),
    experts=st.sampled_from([4, 6]),
    shared=st.integers(0, 2),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
)
def test_every_row_of_every_tensor_has_one_owner(layers, dense, kv, repeat, experts, shared, flags):
    merged, bias, qkv_bias, tied = flags
    config = make_config(
        num_hidden_layers=layers,
        first_k_dense_replace=dense,
        num_key_value_heads=kv,
        num_attention_heads=kv * repeat,
        num_experts=experts,
        num_shared_experts=shared,
        use_bias=bias,
        use_qkv_bias=qkv_bias,
        tie_word_embeddings=tied,
    )
    blocks = pieces(config, merged)
    specs = flatten_specs(weight_specs(config))
    assert blocks.keys() == specs.keys()
    rows: dict[str, list[tuple[int, int]]] = {}
    for path, spec in specs.items():
        assert sum(p.rows * p.cols for p in blocks[path]) == math.prod(spec.shape)
        for piece in blocks[path]:
            rows.setdefault(piece.name, []).append((piece.start, piece.start + piece.rows))
            height = math.prod(piece.shape) // piece.cols
            assert piece.start + piece.rows <= height
    for name, ranges in rows.items():
        ranges.sort()
        assert ranges[0][0] == 0
        assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges)), name
    assert rows.keys() == hf_names(config, merged).keys()
