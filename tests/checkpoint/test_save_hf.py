"""Export: byte-identical round trips, files and index, all or nothing."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_jax.checkpoint import (
    CheckpointError,
    companion_files,
    load_hf,
    read_source_config,
    save_hf,
    stored_dtypes,
)
from llada_jax.checkpoint import disassemble as disassemble_module
from llada_jax.checkpoint.safetensors_io import Writer
from llada_jax.parallel import make_mesh

from .synthetic import (
    BF16,
    F16,
    F32,
    VARIANTS,
    make_config,
    make_tensors,
    merge,
    read,
    same_bytes,
    write,
)

COUNTING = Path(__file__).parent.parent / "golden" / "counting"


def bias_in_fp32(name):
    return F32 if name.endswith("expert_bias") else BF16


def test_counting_checkpoint_comes_back_byte_by_byte(tmp_path):
    config, params = load_hf(COUNTING)
    raw = read_source_config(COUNTING)
    save_hf(
        tmp_path / "out", config, params, source_config=raw, extra_files=companion_files(COUNTING)
    )
    same_bytes(read(tmp_path / "out"), read(COUNTING))
    assert read_source_config(tmp_path / "out") == raw
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (COUNTING / name).read_bytes()


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [(variant, bias_in_fp32) for variant in VARIANTS] + [("plain", F32), ("biases", F16)],
    ids=[*VARIANTS, "f32", "f16"],
)
def test_round_trip(tmp_path, variant, dtype):
    config = make_config(**VARIANTS[variant])
    split = make_tensors(config, dtype)
    merged = merge(config, split)
    for name, stored in (("split", split), ("merged", merged)):
        _, params = load_hf(write(tmp_path / name, config, stored))
        save_hf(tmp_path / f"{name}-split", config, params)
        same_bytes(read(tmp_path / f"{name}-split"), split)
        save_hf(tmp_path / f"{name}-merged", config, params, merged_experts=True)
        same_bytes(read(tmp_path / f"{name}-merged"), merged)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31), limit=st.sampled_from([1, 700, 5000, 10**9]))
def test_any_mixture_of_precisions_comes_back(tmp_path_factory, seed, limit):
    rng = np.random.default_rng(seed)
    config = make_config(use_bias=True, use_qkv_bias=True)
    tensors = make_tensors(config, lambda name: (BF16, F16, F32)[rng.integers(3)])
    base = tmp_path_factory.mktemp("mixed")
    folder = write(base / "in", config, tensors, files=1 + seed % 3)
    _, params = load_hf(folder)
    save_hf(base / "out", config, params, dtypes=stored_dtypes(folder), max_shard_bytes=limit)
    same_bytes(read(base / "out"), tensors)


@pytest.mark.parametrize("sizes", [{"expert": 8}, {"fsdp": 2, "tensor": 2, "data": 2}], ids=str)
def test_sharded_arrays_are_gathered(tmp_path, sizes):
    config = make_config(use_bias=True)
    tensors = make_tensors(config, BF16)
    _, params = load_hf(write(tmp_path / "in", config, tensors), mesh=make_mesh(**sizes))
    save_hf(tmp_path / "out", config, params)
    same_bytes(read(tmp_path / "out"), tensors)


def test_layers_sharded_by_the_user(tmp_path):
    config = make_config(num_hidden_layers=9)
    tensors = make_tensors(config)
    _, params = load_hf(write(tmp_path / "in", config, tensors))
    mesh = make_mesh(data=8)
    by_layer = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    params["moe_layers"] = jax.device_put(params["moe_layers"], by_layer)
    save_hf(tmp_path / "out", config, params)
    same_bytes(read(tmp_path / "out"), tensors)


def test_numpy_parameters_are_written_too(tmp_path):
    config = make_config()
    tensors = make_tensors(config, BF16)
    _, params = load_hf(write(tmp_path / "in", config, tensors))
    save_hf(tmp_path / "out", config, jax.tree.map(np.asarray, params))
    same_bytes(read(tmp_path / "out"), tensors)


def test_big_tensors_are_written_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("llada_jax.checkpoint.matrices.CHUNK_BYTES", 200)
    config = make_config()
    tensors = make_tensors(config)
    _, params = load_hf(write(tmp_path / "in", config, tensors))
    save_hf(tmp_path / "out", config, params)
    same_bytes(read(tmp_path / "out"), tensors)


def test_device_path_gives_the_same_layers(tmp_path):
    """What runs on an accelerator, here on the CPU."""
    array = jnp.arange(24.0).reshape(3, 2, 4)
    for layer in range(3):
        found = disassemble_module._layer(array, jnp.int32(layer))
        np.testing.assert_array_equal(found, array[layer])


def test_several_files_and_their_index(tmp_path):
    config = make_config()
    tensors = make_tensors(config, BF16)
    _, params = load_hf(write(tmp_path / "in", config, tensors))
    save_hf(tmp_path / "out", config, params, max_shard_bytes=8000)
    files = sorted(f.name for f in (tmp_path / "out").glob("*.safetensors"))
    count = len(files)
    assert count > 1
    assert files == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in tensors.values())}
    for name, file in index["weight_map"].items():
        assert name in read_names(tmp_path / "out" / file)
    assert index["weight_map"].keys() == tensors.keys()
    same_bytes(read(tmp_path / "out"), tensors)
    load_hf(tmp_path / "out")


def read_names(file):
    import safetensors

    with safetensors.safe_open(file, "np") as opened:
        assert opened.metadata() == {"format": "pt"}
        return set(opened.keys())


def test_a_tensor_above_the_limit_has_a_file_of_its_own():
    sizes = {"a": 10, "b": 50, "c": 10, "d": 5}
    plan = disassemble_module.plan_files({n: (F32, (s,)) for n, s in sizes.items()}, 60)
    assert list(plan.values()) == [["a"], ["b"], ["c", "d"]]
    assert disassemble_module.plan_files({"a": (F32, (9,))}, 1) == {"model.safetensors": ["a"]}


def test_config_without_a_source(tmp_path):
    config = make_config()
    _, params = load_hf(write(tmp_path / "in", config, make_tensors(config, BF16)))
    save_hf(tmp_path / "out", config, params)
    assert load_hf(tmp_path / "out")[0] == config
    assert read_source_config(tmp_path / "out")["dtype"] == "bfloat16"


def test_model_type_follows_the_expert_layout(tmp_path):
    config = make_config()
    _, params = load_hf(write(tmp_path / "in", config, make_tensors(config)))
    raw = read_source_config(tmp_path / "in") | {"auto_map": {"AutoConfig": "x.Y"}}
    save_hf(tmp_path / "a", config, params, source_config=raw)
    assert read_source_config(tmp_path / "a") == raw
    save_hf(tmp_path / "b", config, params, source_config=raw, merged_experts=True)
    merged = read_source_config(tmp_path / "b")
    assert merged == raw | {"model_type": "llada2_moe_veomni"}
    _, again = load_hf(tmp_path / "b")
    save_hf(tmp_path / "c", config, again, source_config=merged)
    assert read_source_config(tmp_path / "c") == raw


@pytest.fixture
def loaded(tmp_path):
    config = make_config()
    return load_hf(write(tmp_path / "in", config, make_tensors(config)))


def test_an_empty_folder_is_used(tmp_path, loaded):
    (tmp_path / "out").mkdir()
    save_hf(tmp_path / "out", *loaded)
    load_hf(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_nothing_is_overwritten(tmp_path, loaded, kind):
    target = tmp_path / "out"
    if kind == "folder":
        target.mkdir()
        (target / "precious").write_text("x")
    else:
        target.write_text("x")
    with pytest.raises(CheckpointError, match="out exists already"):
        save_hf(target, *loaded)
    assert (target / "precious" if kind == "folder" else target).read_text() == "x"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failure_leaves_nothing_behind(tmp_path, loaded, monkeypatch, error):
    calls = []
    original = Writer.write_rows

    def fail_later(self, *args):
        calls.append(args)
        if len(calls) > 20:
            raise error
        original(self, *args)

    monkeypatch.setattr(Writer, "write_rows", fail_later)
    expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        save_hf(tmp_path / "out", *loaded)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_missing_extra_file(tmp_path, loaded):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        save_hf(tmp_path / "out", *loaded, extra_files=[tmp_path / "tokenizer.json"])
    assert not (tmp_path / "out").exists()


def test_parameters_that_do_not_fit(tmp_path, loaded):
    config, params = loaded
    changed = {k: v for k, v in params.items() if k != "lm_head"} | {"extra": {"scale": 0}}
    with pytest.raises(CheckpointError, match=r"missing lm_head/kernel; unexpected extra/scale"):
        save_hf(tmp_path / "out", config, changed)
    with pytest.raises(CheckpointError, match=r"final_norm/scale has shape \[3\]"):
        save_hf(tmp_path / "out", config, params | {"final_norm": {"scale": jnp.zeros(3)}})
    bad = {"scale": jnp.zeros(16, jnp.int8)}
    with pytest.raises(CheckpointError, match=r"final_norm/scale cannot be written: .*int8"):
        save_hf(tmp_path / "out", config, params | {"final_norm": bad})
    other = make_config(num_experts=4, n_group=1).to_hf()
    with pytest.raises(CheckpointError, match="source_config describes other weights"):
        save_hf(tmp_path / "out", config, params, source_config=other)
    with pytest.raises(CheckpointError, match=r"source_config: .*model_type"):
        save_hf(tmp_path / "out", config, params, source_config={"model_type": "gpt2"})
    assert not (tmp_path / "out").exists()


def test_progress_bar(tmp_path, loaded, capsys):
    save_hf(tmp_path / "out", *loaded, progress=True)
    assert "writing weights" in capsys.readouterr().err
