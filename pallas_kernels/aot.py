"""Compiling for TPUs with the real compiler, without a TPU (needs the ``libtpu`` package).

libtpu reads its environment when it is first loaded: call ``prepare`` before anything asks jax for
devices.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels.chips import CHIPS, Chip


def prepare(dump: str | os.PathLike[str] | None = None) -> None:
    """Sets what libtpu needs on a machine without a TPU.

    Args:
      dump: a folder for the compiler's low-level schedules (``schedule.py`` reads them).
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # compiling alone shares nothing
    if dump is not None:
        flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
        flags += " --xla_jf_dump_llo_pass_label_regex=final"  # not all 70 passes: far quicker
        os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()


@functools.cache
def devices(chip: str) -> tuple[Any, ...]:
    """The devices of a small topology of ``chip`` (a key of ``CHIPS``)."""
    prepare()
    return tuple(topologies.get_topology_desc(CHIPS[chip].topology, "tpu").devices)


def mesh(chip: str, **axes: int) -> Mesh:
    """A mesh of named axes over the first devices of ``chip``; one device without axes."""
    axes = axes or {"data": 1}
    shape = tuple(axes.values())
    chosen = np.array(devices(chip)[: int(np.prod(shape))]).reshape(shape)
    return Mesh(chosen, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def compile_for(chip: str | Chip, function: Any, *arguments: Any) -> jax.stages.Compiled:
    """Compiles for one device.

    Args:
      chip: the generation.
      function: to be jitted, or already a jitted function.
      arguments: arrays or ``ShapeDtypeStruct`` in pytrees; only shapes and types are used.
    """
    name = chip if isinstance(chip, str) else chip.name
    where = NamedSharding(mesh(name), PartitionSpec())
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), arguments
    )
    if not hasattr(function, "lower"):
        function = jax.jit(function)
    return function.lower(*shapes).compile()
