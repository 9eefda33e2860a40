"""Import of the Hugging Face layout against the plain twin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from llada_jax.checkpoint import CheckpointError, load_hf
from llada_jax.checkpoint import assemble as assemble_module
from llada_jax.checkpoint.safetensors_io import Reader
from llada_jax.model.weights import flatten_specs, weight_specs
from llada_jax.parallel import make_mesh, named_sharding

from .synthetic import BF16, F16, F32, VARIANTS, make_config, make_tensors, merge, twin, write


def flat(params):
    return traverse_util.flatten_dict(params, sep="/")


def assert_equals_twin(params, config, tensors):
    expected = twin(config, tensors)
    found = flat(params)
    assert found.keys() == expected.keys() == flatten_specs(weight_specs(config)).keys()
    for path, value in expected.items():
        assert isinstance(found[path], jax.Array)
        assert found[path].dtype == value.dtype, path
        np.testing.assert_array_equal(np.asarray(found[path]), value, err_msg=path, strict=True)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(tmp_path, variant, merged):
    config = make_config(**VARIANTS[variant])
    tensors = make_tensors(config)
    stored = merge(config, tensors) if merged else tensors
    read_config, params = load_hf(write(tmp_path / "m", config, stored))
    assert read_config == config
    assert_equals_twin(params, config, tensors)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_stored_precision_is_kept(tmp_path, dtype):
    config = make_config()
    tensors = make_tensors(config, lambda n: F32 if n.endswith("expert_bias") else dtype)
    _, params = load_hf(write(tmp_path / "m", config, tensors))
    assert_equals_twin(params, config, tensors)
    assert params["moe_layers"]["moe"]["router"]["expert_bias"].dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.float32, "bfloat16", np.float16])
def test_cast_leaves_the_router_alone(tmp_path, dtype):
    config = make_config()
    tensors = make_tensors(config, lambda n: F32 if ".mlp.gate." in n else BF16)
    _, params = load_hf(write(tmp_path / "m", config, tensors), dtype=dtype)
    expected = {n: t if ".mlp.gate." in n else t.astype(dtype) for n, t in tensors.items()}
    assert_equals_twin(params, config, expected)


def test_mixed_layers_take_the_precision_that_holds_all(tmp_path):
    config = make_config()
    mixed = {"model.layers.1.mlp.experts.3.up_proj.weight": F32}
    tensors = make_tensors(config, lambda n: mixed.get(n, BF16))
    _, params = load_hf(write(tmp_path / "m", config, tensors))
    experts = params["moe_layers"]["moe"]["experts"]
    assert experts["up"].dtype == jnp.float32
    assert experts["gate"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        np.asarray(experts["up"][0, 3]), tensors["model.layers.1.mlp.experts.3.up_proj.weight"].T
    )


def test_many_files_with_an_index(tmp_path):
    config = make_config()
    tensors = make_tensors(config, BF16)
    _, params = load_hf(write(tmp_path / "m", config, tensors, files=4))
    assert_equals_twin(params, config, tensors)


def test_many_files_without_an_index(tmp_path):
    config = make_config()
    tensors = make_tensors(config, BF16)
    folder = write(tmp_path / "m", config, tensors, files=3)
    (folder / "model.safetensors.index.json").unlink()
    _, params = load_hf(folder)
    assert_equals_twin(params, config, tensors)


def test_redundant_head_of_a_tied_model_is_ignored(tmp_path):
    config = make_config(tie_word_embeddings=True)
    tensors = make_tensors(config)
    extra = tensors | {"lm_head.weight": tensors["model.word_embeddings.weight"]}
    _, params = load_hf(write(tmp_path / "m", config, extra))
    assert_equals_twin(params, config, tensors)


def test_given_config_replaces_the_file(tmp_path):
    config = make_config()
    folder = write(tmp_path / "m", config, make_tensors(config))
    (folder / "config.json").unlink()
    assert load_hf(folder, config=config)[0] is config


def test_big_tensors_are_read_in_chunks(tmp_path, monkeypatch):
    config = make_config()
    tensors = make_tensors(config)
    monkeypatch.setattr("llada_jax.checkpoint.matrices.CHUNK_BYTES", 200)
    _, params = load_hf(write(tmp_path / "m", config, tensors))
    assert_equals_twin(params, config, tensors)


MESHES = [
    {"expert": 8},
    {"fsdp": 8},
    {"tensor": 2, "expert": 4},
    {"fsdp": 2, "expert": 2, "tensor": 2},
    {"data": 4, "expert": 2},
]


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_sharded_over_eight_devices(tmp_path, sizes, merged):
    mesh = make_mesh(**sizes)
    config = make_config(use_bias=True, use_qkv_bias=True)
    tensors = make_tensors(config, BF16)
    stored = merge(config, tensors) if merged else tensors
    _, params = load_hf(write(tmp_path / "m", config, stored), mesh=mesh)
    assert_equals_twin(params, config, tensors)
    for path, spec in flatten_specs(weight_specs(config)).items():
        array = flat(params)[path]
        assert array.sharding == named_sharding(spec.axes, spec.shape, mesh), path
        for shard in array.addressable_shards:  # what each device holds, not only the whole
            np.testing.assert_array_equal(
                np.asarray(shard.data), twin(config, tensors)[path][shard.index]
            )


def test_axis_that_does_not_divide(tmp_path):
    config = make_config(num_key_value_heads=2)
    folder = write(tmp_path / "m", config, make_tensors(config))
    with pytest.raises(ValueError, match="kv_heads"):
        load_hf(folder, mesh=make_mesh(tensor=4, data=2))


def record_reads(monkeypatch):
    reads = []
    original = Reader.read_rows

    def spy(self, info, first_row, out):
        reads.append((info.name, first_row, len(out)))
        original(self, info, first_row, out)

    monkeypatch.setattr(Reader, "read_rows", spy)
    return reads


def test_every_row_is_read_once(tmp_path, monkeypatch):
    config = make_config()
    tensors = make_tensors(config)
    reads = record_reads(monkeypatch)
    load_hf(write(tmp_path / "m", config, tensors), mesh=make_mesh(data=2, expert=2, tensor=2))
    rows = {}
    for name, _, count in reads:
        rows[name] = rows.get(name, 0) + count
    assert rows == {name: tensor.shape[0] for name, tensor in tensors.items()}


def test_only_rows_of_local_devices_are_read(tmp_path, monkeypatch):
    """A process that holds half of the experts and of the heads reads half of their rows."""
    config = make_config()
    folder = write(tmp_path / "m", config, make_tensors(config))
    mesh = make_mesh(expert=2, tensor=2, data=2)
    local = set(mesh.devices[:, :, 0, 0].flat)  # of 8: first half of experts, first of heads
    real = jax.sharding.NamedSharding.addressable_devices_indices_map

    def only_local(self, shape):
        return {d: index for d, index in real(self, shape).items() if d in local}

    monkeypatch.setattr(jax.sharding.NamedSharding, "addressable_devices_indices_map", only_local)
    monkeypatch.setattr(
        assemble_module.jax, "make_array_from_single_device_arrays", lambda *a, **k: jnp.zeros(1)
    )
    reads = record_reads(monkeypatch)
    load_hf(folder, mesh=mesh)
    experts = {
        name.split(".experts.")[1].split(".")[0] for name, *_ in reads if ".experts." in name
    }
    assert experts == {"0", "1", "2", "3"}
    qkv = sorted(r[1:] for r in reads if r[0] == "model.layers.0.attention.query_key_value.weight")
    assert qkv == [(0, 16), (32, 8), (48, 8)]  # 2 of 4 query heads of 8, 1 of 2 key, value heads


def test_arrays_adopt_their_buffers(tmp_path, monkeypatch):
    config = make_config()
    made = []
    original = assemble_module.aligned_empty

    def spy(shape, dtype):
        made.append(original(shape, dtype))
        return made[-1]

    monkeypatch.setattr(assemble_module, "aligned_empty", spy)
    _, params = load_hf(write(tmp_path / "m", config, make_tensors(config)))
    pointers = {a.unsafe_buffer_pointer() for a in jax.tree.leaves(params)}
    assert pointers == {buffer.ctypes.data for buffer in made}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite_names_the_tensor(tmp_path, value):
    config = make_config()
    tensors = make_tensors(config, BF16)
    name = "model.layers.2.mlp.experts.5.down_proj.weight"
    tensors[name][3, 4] = value
    folder = write(tmp_path / "m", config, tensors, files=2)
    with pytest.raises(CheckpointError, match=r"experts\.5\.down_proj.* at \[3, 4\]") as caught:
        load_hf(folder)
    assert "model-0000" in str(caught.value)
    assert "use an earlier checkpoint" in str(caught.value)
    _, params = load_hf(folder, check_finite=False)
    assert not np.isfinite(float(params["moe_layers"]["moe"]["experts"]["down"][1, 5, 4, 3]))


def test_not_finite_in_merged_and_fused_tensors(tmp_path):
    config = make_config()
    tensors = merge(config, make_tensors(config))
    tensors["model.layers.1.mlp.experts.up_proj"][6, 2, 9] = np.nan
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.up_proj .*\[6, 2, 9\]"):
        load_hf(write(tmp_path / "a", config, tensors))
    tensors = make_tensors(config)
    tensors["model.layers.0.attention.query_key_value.weight"][50, 1] = np.nan
    with pytest.raises(CheckpointError, match=r"query_key_value.* at \[50, 1\]"):
        load_hf(write(tmp_path / "b", config, tensors))


def test_overflow_of_the_cast_is_told_apart(tmp_path):
    config = make_config()
    tensors = make_tensors(config)
    tensors["model.norm.weight"][2] = 1e6
    folder = write(tmp_path / "m", config, tensors)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight .*too large for float16"):
        load_hf(folder, dtype=jnp.float16)
    load_hf(folder, dtype=jnp.bfloat16)


@pytest.mark.parametrize("dtype", [jnp.int8, "float64", "nonsense"])
def test_precision_that_is_not_supported(tmp_path, dtype):
    config = make_config()
    folder = write(tmp_path / "m", config, make_tensors(config))
    with pytest.raises(CheckpointError, match="cannot be loaded as"):
        load_hf(folder, dtype=dtype)


def test_progress_bar_counts_bytes(tmp_path, capsys):
    config = make_config()
    load_hf(write(tmp_path / "m", config, make_tensors(config)), progress=True)
    out = capsys.readouterr().err
    assert "loading weights" in out
    assert "kB" in out


def test_staging_is_bounded_off_the_cpu():
    parts = list(range(8))
    assert assemble_module.batches(parts, 1 << 30, on_cpu=True) == [parts]
    assert assemble_module.batches(parts, 1 << 30, on_cpu=False) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert assemble_module.batches(parts, 1 << 40, on_cpu=False) == [[i] for i in parts]
    assert assemble_module.batches([], 0, on_cpu=False) == []
