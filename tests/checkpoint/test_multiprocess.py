"""Two processes of four devices: each reads its part, both save and restore together."""

import os
import socket
import subprocess
import sys

import numpy as np

from llada_jax.checkpoint import convert

from .synthetic import BF16, make_config, make_tensors, read, same_bytes, twin, write

PROGRAM = """
import sys
import jax, numpy as np
from pathlib import Path

rank, port, base = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, rank)
from llada_jax.checkpoint import CheckpointError, load_hf, load_native, save_hf, save_native
from llada_jax.checkpoint.safetensors_io import Reader
from llada_jax.parallel import make_mesh

reads = set()
original = Reader.read_rows
def spy(self, info, first, out):
    reads.add(info.name)
    original(self, info, first, out)
Reader.read_rows = spy

config, params = load_hf(base / "in", mesh=make_mesh(expert=8))
experts = {int(n.split(".")[5]) for n in reads if ".experts." in n}
assert experts == set(range(4 * rank, 4 * rank + 4)), experts
try:
    save_hf(base / f"no{rank}", config, params)
except CheckpointError as error:
    assert "save_native" in str(error), error
else:
    raise AssertionError("half a model was written")
save_native(base / "own", config, params)
_, again = load_native(base / "own", mesh=make_mesh(fsdp=2, expert=4))
gate = again["moe_layers"]["moe"]["experts"]["gate"]
assert len(gate.addressable_shards) == 4
for shard in gate.addressable_shards:
    expected = np.load(base / "gate.npy")[shard.index]
    np.testing.assert_array_equal(np.asarray(shard.data, np.float32), expected)
"""


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return str(s.getsockname()[1])


def test_two_processes(tmp_path):
    config = make_config()
    tensors = make_tensors(config, BF16)
    write(tmp_path / "in", config, tensors)
    gate = twin(config, tensors)["moe_layers/moe/experts/gate"]
    np.save(tmp_path / "gate.npy", gate.astype(np.float32))
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    port = free_port()
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), port, str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [child.communicate(timeout=100)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [c.returncode for c in children] == [0, 0], "\n".join(outputs)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["in", "own"]
    convert(tmp_path / "own", tmp_path / "out")
    same_bytes(read(tmp_path / "out"), tensors)
