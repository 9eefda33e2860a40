"""The own reader and writer against the safetensors package."""

import json
import struct

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_jax.checkpoint import CheckpointError
from llada_jax.checkpoint.safetensors_io import Reader, Writer, dtype_code, read_header

from .synthetic import BF16, F16, F32, same_bytes

TENSORS = st.lists(
    st.tuples(st.sampled_from([BF16, F16, F32]), st.lists(st.integers(0, 5), max_size=3)),
    min_size=1,
    max_size=6,
)


def random_tensors(layout):
    rng = np.random.default_rng(0)
    return {
        f"tensor.{i}": np.asarray(rng.normal(size=shape)).astype(dtype)
        for i, (dtype, shape) in enumerate(layout)
    }


def as_matrix(tensor):
    return tensor.reshape(-1, tensor.shape[-1] if tensor.ndim > 1 else 1)


@settings(max_examples=40, deadline=None)
@given(TENSORS)
def test_reads_what_the_package_writes(tmp_path_factory, layout):
    tensors = random_tensors(layout)
    file = tmp_path_factory.mktemp("io") / "a.safetensors"
    safetensors.numpy.save_file(tensors, file)
    infos = read_header(file)
    assert infos.keys() == tensors.keys()
    with Reader() as reader:
        for name, tensor in tensors.items():
            assert (infos[name].shape, infos[name].dtype) == (tensor.shape, tensor.dtype)
            if tensor.size:
                out = np.empty_like(as_matrix(tensor))
                reader.read_rows(infos[name], 0, out)
                assert out.tobytes() == tensor.tobytes()


@settings(max_examples=40, deadline=None)
@given(TENSORS)
def test_the_package_reads_what_is_written(tmp_path_factory, layout):
    tensors = random_tensors(layout)
    file = tmp_path_factory.mktemp("io") / "a.safetensors"
    with Writer(file, {n: (t.dtype, t.shape) for n, t in tensors.items()}) as writer:
        for name, tensor in reversed(tensors.items()):
            if tensor.size:
                writer.write_rows(name, 0, as_matrix(tensor))
    same_bytes(safetensors.numpy.load_file(file), tensors)
    with safetensors.safe_open(file, "np") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_rows_are_read_and_written_one_by_one(tmp_path):
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    file = tmp_path / "a.safetensors"
    with Writer(file, {"x": (F32, (4, 3))}) as writer:
        for row in (2, 0, 3, 1):
            writer.write_rows("x", row, values[row : row + 1])
    out = np.empty((2, 3), np.float32)
    with Reader() as reader:
        reader.read_rows(read_header(file)["x"], 1, out)
    np.testing.assert_array_equal(out, values[1:3])


def test_unsupported_precision_is_refused_by_name():
    assert dtype_code(BF16) == "BF16"
    with pytest.raises(CheckpointError, match="int8 is not supported; use float32"):
        dtype_code(np.int8)


def write_raw(file, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return file


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"not json", b"", "damaged header"),
        (b"[1, 2]", b"", "damaged header"),
        (b"\xff\xfe{}", b"", "damaged header"),
        ({"x": {"dtype": "F32"}}, b"", "damaged header"),
        ({"x": 3}, b"", "damaged header"),
        ({"x": ENTRY | {"shape": [3]}}, bytes(8), "given 8 bytes, not 12"),
        ({"x": ENTRY | {"shape": [-2]}}, bytes(8), "not whole numbers"),
        ({"x": ENTRY | {"shape": ["2"]}}, bytes(8), "damaged header"),
        ({"x": ENTRY | {"data_offsets": [8, 16]}}, bytes(16), "starts at byte"),
        ({"x": ENTRY, "y": ENTRY}, bytes(16), "starts at byte"),
        (b'{"x": {}, "x": {}}', b"", "a name occurs twice"),
        ({"x": ENTRY}, bytes(7), "truncated"),
        ({"x": ENTRY}, bytes(9), "describes"),
        ({"x": ENTRY | {"dtype": "F8_E4M3"}}, bytes(8), "x in .* is stored as F8_E4M3"),
        ({"x": ENTRY | {"dtype": "F64"}}, bytes(8), "stored as F64, which is not supported"),
        ({"x": ENTRY | {"dtype": "Q9"}}, bytes(8), "stored as Q9"),
    ],
)
def test_damaged_files_are_told_apart(tmp_path, header, data, message):
    file = write_raw(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(file)
    assert "bad.safetensors" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"1234", b"version https://git-lfs.github.com/spec/v1\n"])
def test_other_files_are_not_taken_for_safetensors(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_header(tmp_path / "x.safetensors")


def test_header_cut_off(tmp_path):
    file = write_raw(tmp_path / "x.safetensors", {"x": ENTRY}, length=5000)
    with pytest.raises(CheckpointError, match="truncated"):
        read_header(file)


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / "none.safetensors")


def test_file_that_shrinks_while_it_is_read(tmp_path):
    file = write_raw(tmp_path / "x.safetensors", {"x": ENTRY}, bytes(8))
    info = read_header(file)["x"]
    file.write_bytes(file.read_bytes()[:-4])
    with Reader() as reader, pytest.raises(CheckpointError, match="ended while x was read"):
        reader.read_rows(info, 0, np.empty((2, 1), np.float32))
