"""The TPU generations that the kernels are compiled for, and their public figures."""

from __future__ import annotations

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
    """What jax calls a device: a chip of v5e, v5p and v6e, half a chip of tpu7x.

    Attributes:
      name: the generation.
      device_kind: what jax calls it.
      topology: a small topology for ``jax.experimental.topologies``; the first device is used.
      hbm_gib: memory.
      bandwidth: HBM bytes a second.
      bf16_flops: peak of bfloat16 products, a second.
      vmem_bytes: on-chip vector memory of a core.
      cores: tensor cores of a device; a grid axis marked parallel is divided over them.
      clock_hz: of the tensor core; turns bundles into time. Derived from the peak:
        ``bf16_flops / (cores * MXUs * rows * columns * 2)``.
    """

    name: str
    device_kind: str
    topology: str
    hbm_gib: int
    bandwidth: float
    bf16_flops: float
    vmem_bytes: int
    cores: int
    clock_hz: float


_MIB = 1 << 20

# Cloud TPU documentation; jax's own table (pallas/mosaic/tpu_info.py) agrees, per core.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "TPU v5 lite", "v5e:2x2", 16, 819e9, 197e12, 128 * _MIB, 1, 1.50e9),
        Chip("v5p", "TPU v5", "v5p:2x2x1", 95, 2765e9, 459e12, 64 * _MIB, 2, 1.75e9),
        Chip("v6e", "TPU v6 lite", "v6e:2x2", 32, 1640e9, 918e12, 128 * _MIB, 1, 1.75e9),
        Chip("tpu7x", "TPU7x", "tpu7x:2x2x1", 96, 3690e9, 1154e12, 64 * _MIB, 1, 2.20e9),
    )
}


_SPELLINGS = {"TPU v5e": "v5e", "TPU v5p": "v5p", "TPU v6e": "v6e", "TPU7": "tpu7x"}


def chip_of(device_kind: str) -> Chip | None:
    """The generation that jax calls ``device_kind``; ``None`` if it is not one of ours."""
    if device_kind in _SPELLINGS:
        return CHIPS[_SPELLINGS[device_kind]]
    for chip in CHIPS.values():
        if chip.device_kind == device_kind:
            return chip
    return None


def chip_here() -> Chip | None:
    """The chip that is being compiled for: that of the mesh in force, else of jax's devices.

    ``None`` where that is no TPU of ours.
    """
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return chip_of(abstract.device_kind)
    if jax.default_backend() != "tpu":
        return None
    return chip_of(jax.devices()[0].device_kind)


def cores_here() -> int:
    """Tensor cores of a device of ``chip_here``; 1 without one."""
    chip = chip_here()
    return chip.cores if chip is not None else 1
